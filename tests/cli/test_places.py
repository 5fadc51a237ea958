"""Where runs write: no two at the same place, nothing lost for a name, nothing left by those that were killed."""

import os
from datetime import datetime
from pathlib import Path

import pytest
from support.saved_runs import two_classes

import jbn.cli.train
from jbn.cli import main
from jbn.cli.bad_input import BadInput
from jbn.cli.places import alone_in, new_file, new_folder, results, take

SMALL = ("--epochs", "1", "--batch-size", "32", "--hidden", "3", "--norm", "none")


def train(data, *arguments):
    return main(["train", *map(str, ("--data", data, *SMALL, *arguments))])


def noon(now=datetime(2026, 1, 2, 12)):
    class Noon(datetime):
        @classmethod
        def now(cls):
            return now

    return Noon


class TestNames:
    def test_a_name_that_another_run_is_about_to_take_is_refused_before_any_work(self, tmp_path, capsys):
        data, out = two_classes(tmp_path), tmp_path / "a" / "out"
        with results(out):
            assert train(data, "--out", out) == 2
        assert capsys.readouterr().err == (
            f"jbn: --out: got {out}, which another run is about to write; expected a new or empty folder, so that two "
            f"runs never mix; choose another one.\n"
        )
        with new_file(tmp_path / "m") as file:
            with pytest.raises(BadInput, match="another run is about to write"):
                new_file(tmp_path / "m").__enter__()
            file.touch()

    def test_default_names_of_one_second_never_collide(self, tmp_path, capsys, monkeypatch):
        data = two_classes(tmp_path)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(jbn.cli.train, "datetime", noon())
        with results(Path("runs/train-20260102-120000"), numbered=True) as first:
            (first.work / "file").touch()
            assert train(data) == 0
        assert train(data) == 0
        assert capsys.readouterr().err == ""
        runs = [f"train-20260102-120000{number}" for number in ("", "-2", "-3")]
        assert sorted(os.listdir(tmp_path / "runs")) == runs
        assert (tmp_path / "runs" / runs[2] / "metrics.json").exists()

    def test_a_result_whose_name_is_taken_meanwhile_gets_the_next_one(self, tmp_path, capsys):
        out = tmp_path / "out"
        with results(out) as place:
            (place.work / "file").write_text("result")
            for taken in ("out", "out-2"):
                (tmp_path / taken).mkdir()
            (out / "other").touch()
        assert place.final == tmp_path / "out-2"
        assert (tmp_path / "out-2" / "file").read_text() == "result"
        assert os.listdir(out) == ["other"]
        assert capsys.readouterr().err == f"jbn: --out: got {out}, taken meanwhile; the results are in {out}-2.\n"

    @pytest.mark.parametrize("out", [".", "..", "a/.."])
    def test_a_folder_without_a_name_of_its_own(self, tmp_path, capsys, out):
        assert train(two_classes(tmp_path), "--out", out) == 2
        assert "; expected a new or empty folder with a name of its own; " in capsys.readouterr().err

    def test_two_runs_with_one_folder_of_checkpoints(self, tmp_path, capsys):
        data, kept = two_classes(tmp_path), tmp_path / "kept"
        with alone_in(kept):
            assert train(data, "--checkpoint-dir", kept, "--out", tmp_path / "out") == 2
        assert capsys.readouterr().err == (
            f"jbn: --checkpoint-dir: got {kept}, which another run is using; expected one that no run is writing to; "
            f"wait until it has ended, or choose another --checkpoint-dir.\n"
        )
        with alone_in(kept):
            pass


class TestLeftovers:
    @pytest.fixture(autouse=True)
    def any_age_will_do(self, monkeypatch):
        monkeypatch.setattr("jbn.cli.places._STALE", -3600.0)

    def test_one_that_has_just_been_made_is_not_taken_for_a_leftover(self, tmp_path, monkeypatch):
        """Its process may be about to lock it."""
        monkeypatch.setattr("jbn.cli.places._STALE", 3600.0)
        (tmp_path / ".jbn-new").mkdir()
        with new_folder(tmp_path / "out"):
            pass
        assert sorted(os.listdir(tmp_path)) == [".jbn-new", "out"]

    def test_those_of_killed_processes_are_swept_away_and_others_stay(self, tmp_path):
        """A lock that nobody holds, and no lock at all, as of version 0.1.0."""
        (tmp_path / ".jbn-old" / "run").mkdir(parents=True)
        (tmp_path / ".jbn-dead").mkdir()
        os.close(take(tmp_path / ".jbn-dead" / "lock"))
        (tmp_path / ".jbn-alive").mkdir()
        lock = take(tmp_path / ".jbn-alive" / "lock")
        with new_folder(tmp_path / "out"):
            pass
        assert sorted(os.listdir(tmp_path)) == [".jbn-alive", "out"]
        os.close(lock)
        with new_file(tmp_path / "file") as file:
            file.touch()
        assert sorted(os.listdir(tmp_path)) == ["file", "out"]

    def test_a_leftover_of_the_same_name_is_no_hindrance(self, tmp_path, monkeypatch):
        monkeypatch.setattr("jbn.cli.places._STALE", 3600.0)
        with new_folder(tmp_path / "out") as work:
            hidden = work.parents[1]
        (hidden / "work" / "out").mkdir(parents=True)
        (hidden / "work" / "out" / "half").touch()
        with new_folder(tmp_path / "out"):
            pass
        assert os.listdir(tmp_path / "out") == []

    def test_a_file_system_without_locks_keeps_nobody_out(self, tmp_path, monkeypatch):
        def none(*arguments):
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr("jbn.cli.places.fcntl.flock", none)
        with new_folder(tmp_path / "out") as work:
            (work / "file").touch()
        assert os.listdir(tmp_path / "out") == ["file"]
