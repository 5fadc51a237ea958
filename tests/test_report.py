"""Pictures: what stands in them, looked up in the figure's own objects."""

import re
import sys

import numpy as np
import pytest

from jbn.report import plot_activations, plot_curves


def test_curves_draw_every_step_and_epoch_of_every_run():
    runs = {
        "one": {"loss": np.linspace(3, 1, 30), "accuracy": [0.5, 0.75]},
        "two": {"loss": np.full(30, 2.0), "accuracy": [0.25, 1.0]},
    }
    losses, accuracies = plot_curves(runs).axes
    raw, mean, *_ = losses.lines
    np.testing.assert_allclose(raw.get_ydata(), runs["one"]["loss"])
    np.testing.assert_allclose(mean.get_ydata()[0], np.mean(runs["one"]["loss"][:10]))
    assert mean.get_xdata()[[0, -1]].tolist() == [10, 30]
    np.testing.assert_allclose([line.get_ydata() for line in accuracies.lines], [[50, 75], [25, 100]])
    assert [text.get_text() for text in accuracies.get_legend().get_texts()] == ["one", "two"]


def test_curves_tell_runs_apart_by_more_than_colour():
    run = {"loss": [1.0, 0.5], "accuracy": [0.5]}
    _, accuracies = plot_curves({"one": run, "two": run}).axes
    one, two = accuracies.lines
    assert one.get_color() != two.get_color()
    assert one.get_linestyle() != two.get_linestyle()


def test_curves_take_losses_that_are_not_finite(tmp_path):
    run = {"loss": [1.0, np.nan, np.inf], "accuracy": [0.5]}
    plot_curves({"one": run}).savefig(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_activations_show_histogram_and_units_of_each_array():
    z = np.random.default_rng(0).normal(size=(200, 6)) + np.arange(6)[::-1]
    figure = plot_activations({"before": z, "after": z - z.mean(0)}, title="layer 2")
    above, _, below, _ = figure.axes
    bars = above.patches
    area = sum(bar.get_width() * bar.get_height() for bar in bars)
    inside = np.mean((z >= bars[0].get_x()) & (z <= bars[-1].get_x() + bars[-1].get_width()))
    assert area == pytest.approx(inside)
    assert inside > 0.98
    assert above.get_title() == f"before\nmean {z.mean():.2f}, standard deviation {z.std():.2f}"
    np.testing.assert_allclose(below.lines[0].get_ydata(), np.sort(np.median(z, axis=0)))
    assert figure.get_suptitle() == "layer 2"


def test_activations_take_a_constant_layer(tmp_path):
    plot_activations({"dead": np.zeros((5, 2))}).savefig(tmp_path / "dead.png")
    assert (tmp_path / "dead.png").stat().st_size > 1000


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("error")
def test_activations_take_values_that_are_not_finite(tmp_path, value):
    z = np.random.default_rng(0).normal(size=(50, 4))
    z[:, 1] = z[3, 2] = value
    figure = plot_activations({"partly": z, "all": np.full((5, 2), value)})
    figure.savefig(tmp_path / "z.png")
    titles = [axes.get_title() for axes in figure.axes[:2]]
    assert "51 of 200 values not finite" in titles[0]
    assert titles[1] == "all\nno finite values"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: plot_curves({}),
            "runs: got nothing to draw; expected at least one entry; pass name → values.",
        ),
        (
            lambda: plot_activations({}),
            "values: got nothing to draw; expected at least one entry; pass name → values.",
        ),
        (
            lambda: plot_activations({"z": np.zeros(3)}),
            "values: got shape (3,) for 'z'; expected (N, C), examples by units, not empty; reshape it.",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_pictures_leave_pyplot_alone():
    before = "matplotlib.pyplot" in sys.modules
    plot_curves({"one": {"loss": [1.0], "accuracy": [0.5]}})
    assert ("matplotlib.pyplot" in sys.modules) == before
