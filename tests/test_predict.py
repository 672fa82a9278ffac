"""predict.py as its user meets it: answers in the run's own classes, and one line for each error."""

import numpy as np
import pytest
from PIL import Image

import predict
from models import CustomResNet
from utils.dataset import load_dataset
from utils.runs import report
from utils.runs.files import write_json
from utils.runs.weights import WEIGHTS_NAME, load_model, save_weights

CLASSES = ["kite", "slide", "swing"]


@pytest.fixture
def weights(tmp_path):
    """A file with the weights of a small network, whose answers do not matter here."""
    save_weights(CustomResNet(len(CLASSES), width=8), tmp_path / WEIGHTS_NAME, {"classes": CLASSES})
    return tmp_path / WEIGHTS_NAME


@pytest.fixture
def run(weights, capsys):
    """``run(*arguments)`` -> (exit code, lines on stdout, lines on stderr)."""

    def run(*arguments):
        code = predict.main([*map(str, arguments), "--weights", str(weights), "--device", "cpu"])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return run


@pytest.fixture
def folder(tmp_path):
    """Three test and three train pictures of each class."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in CLASSES:
            (tmp_path / "own" / split / name).mkdir(parents=True)
            for index in range(3):
                image = Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8))
                image.save(tmp_path / "own" / split / name / f"{index}.png")
    return tmp_path / "own"


def test_the_answers_use_the_class_names_of_the_weights_file(run, folder):
    picture = folder / "test" / "kite" / "0.png"
    code, (answer, reminder), err = run(picture, "--top", "9")
    assert (code, err) == (0, [])
    assert answer.startswith(f"{picture}: ")
    assert sorted(part.split()[0] for part in answer.split(": ")[1].split(", ")) == CLASSES
    assert "know kite, slide, swing and name one of them whatever a picture shows" in reminder
    assert run(picture, "--top", "1")[1][0].count("%") == 1


def test_bad_pictures_are_named_and_the_rest_classified(run, folder, tmp_path):
    (tmp_path / "notes.png").write_text("not a picture")
    picture = folder / "test" / "kite" / "0.png"
    code, out, err = run(tmp_path / "notes.png", tmp_path / "missing.png", tmp_path, picture)
    assert (code, len(out), out[0].split(":")[0]) == (1, 1, str(picture))
    assert all(line.startswith("predict.py: ") for line in err)
    assert all(name in line for name, line in zip(("notes.png", "missing.png", str(tmp_path), "3 of 4"), err))


@pytest.mark.parametrize("arguments", [[], ["a.png", "--test"], ["a.png", "--top", "0"]])
def test_contradictory_options_are_wrong_settings(run, arguments):
    with pytest.raises(SystemExit, match="2"):
        run(*arguments)


def test_the_weights_are_tested_on_their_runs_data_beside_its_metrics(run, weights, folder):
    dataset = load_dataset(folder).subset(None, 6)
    found = report.test_figures(report.final_test(load_model(weights)[0], dataset), dataset.fingerprint)
    about = {"data": dataset.description, "source": dataset.source, "config": {"test_images": 6}}
    write_json(weights.with_name(report.METRICS_NAME), {**found, **about})
    code, out, err = run("--test", "--data-dir", folder)
    assert (code, err) == (0, [])
    assert out[0].startswith("6 test images of own images in 3 classes")
    figures = f"{report.accuracies(found)}; loss {found['test_loss']:.4f}"
    assert out[1:] == [f"measured now: {figures}", f"metrics.json: {figures}"]
    assert figures.count("%") == 3

    (folder / "test" / "kite").rename(folder / "test" / "ball")
    (folder / "train" / "kite").rename(folder / "train" / "ball")
    assert (
        "the weights know kite, slide, swing, but own images in 3 classes" in run("--test", "--data-dir", folder)[2][0]
    )

    validated = dataset.holdout(3).description  # as older metrics say it
    write_json(weights.with_name(report.METRICS_NAME), {**found, **about, "data": validated})
    code, out, err = run("--test", "--data-dir", folder)
    assert (code, out) == (1, [])
    assert "3 train images held out for validation: the test set is for final results" in err[0]


def test_own_pictures_are_asked_for_before_any_download(run, project_root):
    code, out, err = run("--test")
    assert (code, out) == (1, [])
    assert err == ["predict.py: the weights know kite, slide, swing: name the run's pictures with --data-dir"]
    assert not (project_root / "data").exists()
