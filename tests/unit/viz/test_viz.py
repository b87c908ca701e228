import numpy as np
import pytest

from bestiary.shared.core.errors import BadDataError, MissingDataError
from bestiary.shared.viz.curves import find_metrics, plot_curves, read_metrics
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


CSV = "epoch,step,train/loss,val/dice/mean\n0,0,2.0,\n0,10,1.5,\n0,10,,0.4\n0,20,nan,0.6\n"


def test_curves_of_one_file_and_of_a_run_with_stages(tmp_path):
    for stage in ("first", "second"):
        (tmp_path / "run" / stage).mkdir(parents=True)
        (tmp_path / "run" / stage / "metrics.csv").write_text(CSV)
    file = tmp_path / "run" / "first" / "metrics.csv"
    assert read_metrics(file) == {"train/loss": [(0, 2.0), (10, 1.5)], "val/dice/mean": [(10, 0.4), (20, 0.6)]}
    assert list(find_metrics(tmp_path / "run")) == ["first", "second"]
    assert plot_curves(file, tmp_path / "a.png").read_bytes().startswith(PNG)
    assert plot_curves(tmp_path / "run", tmp_path / "b.png", title="both").read_bytes().startswith(PNG)
    assert plot_curves({"s": file}, tmp_path / "c.png").is_file()


def test_curves_say_what_is_missing(tmp_path):
    with pytest.raises(MissingDataError, match="logger=csv"):
        plot_curves(tmp_path, tmp_path / "a.png")
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BadDataError, match="step"):
        plot_curves(tmp_path / "metrics.csv", tmp_path / "a.png")
    (tmp_path / "metrics.csv").write_text("step,lr\n1,2\n")
    with pytest.raises(MissingDataError, match="no losses"):
        plot_curves(tmp_path / "metrics.csv", tmp_path / "a.png")
