"""The scripts as a user starts them: by path, from anywhere; on data of their own, with labels of their own."""

import json
from shlex import split

import pytest

from sfa import Train_cifar
from tests.end_to_end.runs import ROOT, start

pytestmark = pytest.mark.slow

SCRIPTS = (
    *("afm/train.py", "sfa/Train_cifar.py", "sfa/Train_webvision.py", "me_momentum/main.py"),
    *("me_momentum/Clothing.py", "me_momentum/ClothingData.py", "manifold_dividemix/train_semisup.py"),
    *("manifold_dividemix/train_semisup_miniimagenet.py", "manifold_dividemix/pretrain.py"),
    *("sanm/Train_cifar.py", "sanm/Train_clothing1M.py", "sanm/pretrain.py"),
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_by_path_a_script_uses_its_own_clone_even_where_another_copy_is_installed(script, tmp_path):
    for package in ("common", script.partition("/")[0]):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('the wrong copy')")
    end = start(ROOT / script, "--help", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert end.status == 0, end.err
    assert "usage: " in end.out


def test_on_digits_with_a_subset_and_every_draw_of_a_class(tmp_path):
    data = "--dataset digits --imb_factor 0.1 --noise_mode sym --limit_train 120 --num_epochs 3 --warm_up 1"
    words = [*split(data), *split("--min_draw_count 0 --sample_rate 3 --mixture sklearn --device cpu --out")]
    Train_cifar.main([*words, str(tmp_path / "run")])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["profile"] == "embedded+limit_train=120" and result["noise"]["samples"] == 120
    heading, *_, last = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert dict(zip(heading.split(","), last.split(","), strict=True))["net1_drawn_classes"] == "10"
