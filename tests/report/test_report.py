"""The table against NumPy, and the pictures: what stands in them, looked up in the figure's own objects."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

import jbn
from jbn import BNParams, BNState, BNStats
from jbn.report import plot_activations, plot_curves, plot_statistics, style, summary


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


def test_statistics_draw_each_channel_over_its_running_value():
    state, stats = layers()
    means, variances = plot_statistics(state["a"], stats["a"]).axes
    np.testing.assert_allclose(means.collections[0].get_offsets(), np.stack([MEAN, BATCH_MEAN], 1), rtol=1e-6)
    unbiased = np.log10(BATCH_VAR[:2] * 10 / 9)  # the third variance is 0, and has no logarithm
    drawn = np.stack([np.log10(VAR[:2]), unbiased], 1)
    np.testing.assert_allclose(variances.collections[0].get_offsets(), drawn, rtol=1e-5)
    assert variances.get_title() == "1 of 3 channels not drawn"
    for axes in (means, variances):
        line = axes.lines[0]
        np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
        assert axes.get_xlim() == axes.get_ylim()


def test_statistics_have_two_panels_for_each_layer_of_a_network(tmp_path):
    state, stats = layers()
    state, stats = {str(i): state for i in range(3)}, {str(i): stats for i in range(3)}
    figure = plot_statistics(state, stats)
    figure.savefig(tmp_path / "statistics.png")
    titles = [axes.get_title().split("\n")[0] for axes in figure.axes if "\n" in axes.get_title()]
    assert titles == [f"['{i}']['{name}']" for i in range(3) for name in "ab"]
    assert len(figure.axes) == 12


MEAN, VAR = np.array([1.0, -2.0, 0.5]), np.array([4.0, 0.25, 1e-9])
BATCH_MEAN, BATCH_VAR = np.array([1.5, -2.5, 0.5]), np.array([3.6, 0.5, 0.0])


def layers():
    """Two layers, the second without γ and β."""
    mean, var, batch_mean, batch_var = (jnp.asarray(v, jnp.float32) for v in (MEAN, VAR, BATCH_MEAN, BATCH_VAR))
    counts = jnp.array([3, 4, 4]), jnp.full(3, 10.0)
    state = {"a": BNState(mean, var, counts[0]), "b": BNState(2 * mean, var, counts[0])}
    stats = {"a": BNStats(batch_mean, batch_var, counts[1]), "b": BNStats(batch_mean, batch_var, 0 * counts[1])}
    return state, stats


def params_of_layers():
    a = BNParams(jnp.array([1.5, -5e-4, 2.0]), jnp.array([0.0, -1.0, 3.0]))
    return {"W": jnp.ones((2, 3)), "a": {"W": jnp.ones((3, 3)), "bn": a}, "b": {"bn": BNParams(None, None)}}


class TestSummary:
    def test_holds_the_numbers_of_each_layer(self):
        state, stats = layers()
        a, b = summary(params_of_layers(), state, stats).rows
        assert (a.path, a.features, a.updates) == ("['a']['bn']", (3,), (3, 4))
        np.testing.assert_allclose([a.gamma, a.beta, a.mean, a.var], [(-5e-4, 2), (-1, 3), (-2, 1), (1e-9, 4)])
        assert (a.dead_gamma, a.dead_var, a.dead) == (1, 1, 2)
        running, unbiased = VAR + 1e-5, BATCH_VAR * 10 / 9 + 1e-5
        assert a.drift_mean == pytest.approx(np.max(np.abs(BATCH_MEAN - MEAN) / np.sqrt(running)), rel=1e-5)
        assert a.drift_var == pytest.approx(np.max(np.abs(np.log(unbiased / running))), rel=1e-5)
        assert (b.path, b.gamma, b.beta, b.dead_gamma, b.dead) == ("['b']['bn']", None, None, None, 1)
        assert (b.drift_mean, b.drift_var) == (None, None)  # it saw nothing

    def test_channels_that_saw_nothing_do_not_drift(self):
        state, stats = layers()
        unseen = stats["a"]._replace(mean=jnp.array([1.5, 99.0, 0.5]), count=jnp.array([10.0, 0.0, 10.0]))
        assert summary(None, state["a"], unseen).rows[0].drift_mean == pytest.approx(0.25, rel=1e-4)

    def test_a_running_update_that_copies_the_batch_leaves_no_drift(self):
        _, state = jbn.bn_init(3)
        state = jbn.bn_update_stats(state, layers()[1]["a"])
        (row,) = summary(None, state, layers()[1]["a"]).rows
        np.testing.assert_allclose([row.drift_mean, row.drift_var], 0, atol=1e-6)

    def test_epsilon_sets_what_counts_as_zero(self):
        state, _ = layers()
        assert [summary(None, state["a"], eps=eps).rows[0].dead_var for eps in (1e-7, 1e-5, 1e3)] == [0, 1, 2]

    def test_takes_one_layer_any_nesting_and_no_states(self):
        params, state = jbn.bn_init(4)
        assert summary(params, state).rows[0].path == ""
        assert "(whole)" in str(summary(params, state))
        assert summary({"W1": jnp.ones(2), "bn": params}, state).rows[0].path == "['bn']"
        nested = ({"x": [params, None]}, (params, jnp.ones(3)))
        rows = summary(nested, ({"x": [state, None]}, None)).rows
        assert [(row.path, row.updates) for row in rows] == [("[0]['x'][0]", (0, 0)), ("[1][0]", None)]
        assert [row.mean for row in summary(nested, None).rows] == [None, None]
        assert [row.path for row in summary(None, [state, None, state]).rows] == ["[0]", "[2]"]

    def test_takes_stacked_layers_and_several_feature_axes(self):
        params, state = jbn.bn_init(4)
        stack = jax.tree.map(lambda leaf: jnp.stack([leaf, 3 * leaf]), (params, state))
        (row,) = summary(*stack).rows
        assert (row.features, row.gamma, row.var) == ((2, 4), (1.0, 3.0), (1.0, 3.0))
        assert "2×4" in str(summary(*stack))

    def test_shows_a_nan_instead_of_hiding_it(self):
        params, state = jbn.bn_init(2)
        table = summary(params._replace(gamma=jnp.array([1.0, jnp.nan])), state)
        assert np.isnan(table.rows[0].gamma).all()
        assert "nan … nan" in str(table)

    def test_reads_as_a_table_with_its_thresholds_below(self):
        state, stats = layers()
        lines = str(summary(params_of_layers(), state, stats)).splitlines()
        head, rule, a, b, dead, drift = lines
        assert " ".join(head.split()) == "layer C γ β running μ running σ² updates dead drift μ drift σ²"
        assert len(head) == len(rule) == len(a) == len(b)
        assert a.split()[:6] == ["['a']['bn']", "3", "-0.0005", "…", "2", "-1"]
        assert b.split()[2:4] == ["–", "–"]
        assert "0.001" in dead
        assert "1e-08" in dead
        assert drift.startswith("drift: ")
        assert "drift" not in str(summary(params_of_layers(), state))

    def test_rows_are_plain_values(self):
        state, stats = layers()
        rows = [row._asdict() for row in summary(params_of_layers(), state, stats).rows]
        assert json.loads(json.dumps(rows))[0]["mean"] == [-2, 1]

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (
                lambda p, s: summary({"W": jnp.ones(2)}, None),
                ValueError,
                "params: got no BNParams in it; expected at least one; pass the params of a network with batch norm.",
            ),
            (
                lambda p, s: summary({"a": p, "b": p}, s),
                ValueError,
                "state: got a BNState with 2 BNParams at or below that place in params; expected one; "
                "nest the state as the params are, with None where there is no batch norm.",
            ),
            (
                lambda p, s: summary([p], [s, s]),
                ValueError,
                "state[1]: got a BNState with 0 BNParams at or below that place in params; expected one; "
                "nest the state as the params are, with None where there is no batch norm.",
            ),
            (
                lambda p, s: summary([jbn.bn_init(3)[0]], [s]),
                ValueError,
                "params[0].gamma: got shape (3,); expected (2,), that of the other fields of this layer; "
                "pass the params and the state of one network.",
            ),
            (
                lambda p, s: summary([p], [s], [p]),
                ValueError,
                "stats[0]: got BNParams; expected BNStats; "
                "give it the structure of state, with None where there is no batch norm.",
            ),
            (
                lambda p, s: jax.jit(lambda p, s: summary(p, s).rows[0].mean)(p, s),
                TypeError,
                "params, state, stats: got traced arrays; expected concrete ones; call summary outside jax.jit and "
                "other transformations.",
            ),
            (
                lambda p, s: plot_statistics([None], [None]),
                ValueError,
                "state: got no BNState in it; expected at least one; pass the state of a network with batch norm.",
            ),
            (
                lambda p, s: plot_statistics(s, None),
                TypeError,
                "stats: got None; expected BNStats, or a pytree of them; pass what the network's apply returned.",
            ),
        ],
    )
    def test_errors(self, call, error, message):
        with pytest.raises(error, match=f"^{re.escape(message)}(\n-+\n|$)"):  # JAX adds a rule and a remark
            call(*jbn.bn_init(2))


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


def test_the_style_is_that_of_our_own_pictures():
    run = {"loss": [1.0, 0.5], "accuracy": [0.5, 0.6]}
    ours = plot_curves(dict.fromkeys("abcd", run)).axes[1]
    with matplotlib.rc_context(style(dpi=90)):
        figure = Figure()
        axes = figure.subplots()
        for i in range(4):
            axes.plot([i, 1])
    assert figure.dpi == 90
    assert [(line.get_color(), line.get_linestyle(), line.get_linewidth()) for line in axes.lines] == [
        (line.get_color(), line.get_linestyle(), line.get_linewidth()) for line in ours.lines
    ]


def test_a_notebook_that_has_not_used_pyplot_shows_the_picture():
    png = plot_curves({"one": {"loss": [1.0, 0.5], "accuracy": [0.5]}})._repr_png_()
    assert png.startswith(b"\x89PNG")


def test_pictures_leave_pyplot_alone():
    before = "matplotlib.pyplot" in sys.modules
    plot_curves({"one": {"loss": [1.0], "accuracy": [0.5]}})
    assert ("matplotlib.pyplot" in sys.modules) == before
