import numpy as np
import pytest

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.viz.curves import plot_curves, read_metrics, shown_metrics
from bestiary.shared.viz.overlay import class_colours, save_overlay

PNG = b"\x89PNG\r\n"


def test_overlay_of_a_volume_and_of_an_image(tmp_path):
    rng = np.random.default_rng(0)
    for shape in [(12, 14, 16), (14, 16)]:
        label = np.zeros(shape, int)
        label[tuple(slice(4, 9) for _ in shape)] = 1
        path = save_overlay(
            tmp_path / "deep" / f"{len(shape)}.png",
            rng.normal(size=shape),
            label,
            ["background", "blob"],
            spacing=(2.0, 1.0, 1.0)[-len(shape) :],
            reference=label.T if len(shape) == 2 and shape[0] == shape[1] else label,
            dice={"blob": 1.0},
            title="case",
        )
        assert path.read_bytes().startswith(PNG)


def test_overlay_of_nothing(tmp_path):
    blank = np.zeros((4, 5, 6))
    assert save_overlay(tmp_path / "a.png", blank, blank.astype(int), ["background", "x"]).is_file()


@pytest.mark.parametrize("classes", [2, 11, 63])
def test_every_class_has_its_own_colour(classes):
    colours = class_colours(classes)
    assert colours.shape == (classes, 3)
    assert len(np.unique(colours[1:].round(6), axis=0)) == classes - 1


CSV = """stage,step,train/loss,val/dice/mean,val/hd95/mean
first,1,2.0,,
first,10,1.5,0.4,30
second,5,nan,0.6,20
"""


def test_steps_count_on_through_the_stages(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text(CSV)
    series, stages = read_metrics(file)
    assert stages == [("first", 0.0), ("second", 10.0)]
    assert series["val/dice/mean"] == ([10.0, 15.0], [0.4, 0.6])
    assert series["train/loss"][0] == [1.0, 10.0, 15.0]
    assert shown_metrics(series) == ["val/dice/mean"]
    assert plot_curves({"a": file}, tmp_path / "a.png").read_bytes().startswith(PNG)
    assert plot_curves({"a": file, "b": file}, tmp_path / "b.png", title="both").read_bytes().startswith(PNG)


def test_the_reward_has_a_scale_of_its_own(tmp_path, monkeypatch):
    file = tmp_path / "metrics.csv"
    file.write_text("stage,step,train/loss,train/reward\nsft,1,9,\nsft,2,8,\ngrpo,1,0.0,0.5\ngrpo,2,0.1,0.75\n")
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, dpi: drawn.append(figure))
    plot_curves({"a": file}, tmp_path / "a.png")
    loss, _, reward = drawn[0].axes
    assert [line.get_ydata().tolist() for line in reward.lines] == [[0.5, 0.75]]
    assert reward.get_ylim()[0] > 0.25
    assert loss.get_ylim()[1] > 8
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["a", "reward"]
    assert loss.yaxis.get_visible()
    # GRPO alone has no loss.
    file.write_text("stage,step,train/reward\ngrpo,1,0.5\ngrpo,2,0.75\n")
    plot_curves({"a": file}, tmp_path / "a.png")
    loss, _, reward = drawn[1].axes
    assert [line.get_ydata().tolist() for line in reward.lines] == [[0.5, 0.75]]
    assert (loss.yaxis.get_visible(), reward.yaxis.get_visible()) == (False, True)
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["reward"]


def test_what_a_metric_rests_on_is_not_drawn():
    names = (
        "train/loss",
        "val/bits_per_byte",
        "val/bytes",
        "val/bits_per_byte/jargon",
        "val/bytes/jargon",
        "val/prompts",
    )
    assert shown_metrics({name: ([1.0], [1.0]) for name in names}) == ["val/bits_per_byte", "val/bits_per_byte/jargon"]


def test_curves_say_what_is_missing(tmp_path):
    with pytest.raises(BadDataError, match="No such file"):
        plot_curves({"a": tmp_path / "metrics.csv"}, tmp_path / "a.png")
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BadDataError, match="step"):
        plot_curves({"a": tmp_path / "metrics.csv"}, tmp_path / "a.png")


def test_planes_have_names_sides_and_a_legend_of_what_is_seen(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, dpi: drawn.append(figure))
    label = np.zeros((10, 20, 30), int)
    label[:, 5:15, 10:20] = np.arange(1, 101).reshape(10, 10)  # a class for each column along z
    label[2, 2, 2] = 120  # in none of the three planes
    names = ["background", *(f"class {i}" for i in range(1, 121))]
    options = {"spacing": (5.0, 2.0, 1.0), "title": "a $x", "axes": "RAS"}
    save_overlay(tmp_path / "a.png", np.zeros(label.shape), label, names, **options)
    axial, coronal, sagittal = drawn[0].axes
    assert axial.get_title().startswith("prediction, axial, z = ")
    assert [text.get_text() for text in axial.texts] == ["A", "P", "L", "R"]
    assert [text.get_text() for text in coronal.texts] == ["S", "I", "L", "R"]
    assert [text.get_text() for text in sagittal.texts] == ["S", "I", "P", "A"]
    # mm: what is shown upwards over what is shown to the right.
    assert [axis.get_aspect() for axis in drawn[0].axes] == [2.0, 5.0, 2.5]
    shown = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert shown[-1] == "and 64 more"
    assert len(shown) == 37
    assert "class 120" not in shown
    # Without an orientation a plane is the axis it is cut across.
    save_overlay(tmp_path / "a.png", np.zeros(label.shape), label, names)
    assert drawn[1].axes[0].get_title().startswith("prediction, z = ")
    assert not drawn[1].axes[0].texts


def test_many_scores_are_wrapped(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, dpi: drawn.append(figure))
    blank = np.zeros((4, 5, 6))
    dice = {f"a long name {i}": 0.5 for i in range(100)}
    save_overlay(tmp_path / "a.png", blank, blank.astype(int), ["background", "x"], dice=dice, title="case")
    lines = drawn[0].get_suptitle().split("\n")
    assert len(lines) == 5
    assert all(len(line) <= 150 for line in lines)
    assert lines[-1].endswith("…")
