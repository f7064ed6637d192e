"""What a LoRA file's header tells, on files with the sizes of the real models."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from benchmarks import real_size
from pipelines import Adapter, load_pipeline
from pipelines.catalog import MODELS
from pipelines.errors import LoraError
from pipelines.lora.file import LoraFile
from pipelines.lora.shapes import shapes_of
from tests import lora_zoo
from tests.worker_process import ROOT
from tools import inspect_lora
from tools.inspect_lora import main

LAST_BLOCK = {1536: 29, 3072: 29, 5120: 39}
ATTENTION = [f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"]
IMAGE = ["cross_attn.k_img", "cross_attn.v_img"]


def metadata(base: str, version: str = "0.12.26", trigger_word: str = "") -> dict[str, str]:
    texts = {
        "software": json.dumps({"name": "ai-toolkit", "version": version}),
        "ss_base_model_version": base,
        "training_info": json.dumps({"step": 1500, "epoch": 3}),
    }
    return texts | ({"ss_tag_frequency": json.dumps({f"1_{trigger_word}": {trigger_word: 1}})} if trigger_word else {})


def lora(path: Path, width: int, base: str = "", *, names=ATTENTION, rank: int = 2, blocks=(), **more) -> Path:
    """A LoRA of the first and the last block of the model of this width."""
    tensors = {}
    for block in blocks or (0, LAST_BLOCK[width]):
        for name in names:
            tensors[f"diffusion_model.blocks.{block}.{name}.lora_A.weight"] = np.ones((rank, width), np.float16)
            tensors[f"diffusion_model.blocks.{block}.{name}.lora_B.weight"] = np.ones((width, rank), np.float16)
    save_file(tensors, path, metadata=metadata(base, **more) if base else {})
    return path


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict]:
    status = main([*arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


FILES = {
    "wan21_1b": (1536, "wan_2.1", ATTENTION),
    "wan21_14b": (5120, "wan_2.1", ATTENTION),
    "wan21_i2v_14b": (5120, "wan_2.1", ATTENTION + IMAGE),
    "wan21_i2v_14b480p": (5120, "wan_2.1", ATTENTION + IMAGE),
    "wan22_14b_t2v": (5120, "wan_2.2_14b", ATTENTION),
    "wan22_14b_i2v": (5120, "wan_2.2_14b", ATTENTION),
    "wan22_5b": (3072, "wan_2.2_5b", ATTENTION),
}


@pytest.mark.parametrize("model", MODELS)
def test_a_lora_fits_the_model_it_was_trained_on(model, tmp_path, capsys):
    width, base, names = FILES[model]
    status, facts = report(capsys, str(lora(tmp_path / "a.safetensors", width, base, names=names)), "--model", model)
    assert (status, facts["fits_model"], facts["why_not"]) == (0, True, [])
    assert facts["fits"] == [other for other in MODELS if FILES[other] == FILES[model]]


def test_the_config_beside_a_file_says_how_it_was_trained(tmp_path, capsys):
    file = lora(tmp_path / "boat.safetensors", 1536, "wan_2.1")
    model = {"quantize": True, "quantize_te": False, "low_vram": True}
    process = {"model": model, "train": {"dtype": "bf16"}, "save": {"dtype": "float32"}}
    (tmp_path / "config.yaml").write_text(json.dumps({"config": {"name": "boat", "process": [process]}}))
    _, facts = report(capsys, str(file))
    assert facts["trained_with"]["qtype"] == "qfloat8"
    main([str(file)])
    said = capsys.readouterr().out
    assert "training    quantize, low_vram, qtype qfloat8, dtype bf16, save_dtype float32\n" in said
    assert "match       with `match` preview exact, on the same kind of device\n" in said


def test_what_the_training_means_for_a_match_is_said(tmp_path, capsys):
    file = lora(tmp_path / "boat.safetensors", 1536, "wan_2.1")
    process = {"model": {}, "train": {"dtype": "bf16"}, "save": {"dtype": "bf16"}}
    (tmp_path / "config.yaml").write_text(json.dumps({"config": {"name": "boat", "process": [process]}}))
    main([str(file)])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("match ")]
    assert "save.dtype: bf16 rounds the LoRA" in line and "train.dtype: bf16 without quantization" in line


def test_why_a_lora_does_not_fit_is_said_in_the_workers_words(tmp_path, capsys):
    status, facts = report(capsys, str(lora(tmp_path / "a.safetensors", 5120, "wan_2.1")), "--model", "wan21_1b")
    (reason,) = facts["why_not"]
    assert status == 1
    assert "has 5120 inputs and 5120 outputs in the LoRA, and 1536 and 1536 in this model" in reason
    assert "It looks trained for wan21_14b" in reason


@pytest.mark.parametrize(
    ("model", "hint"),
    [
        ("wan22_14b_t2v", "the LoRA looks trained for wan21_14b"),
        ("wan21_i2v_14b", "the LoRA has no image keys, so it looks trained for a text-to-video model"),
    ],
)
def test_what_the_worker_applies_with_a_warning_fits_with_a_note(model, hint, tmp_path, capsys):
    status, facts = report(capsys, str(lora(tmp_path / "a.safetensors", 5120, "wan_2.1")), "--model", model)
    assert (status, facts["fits_model"], facts["fits"]) == (0, True, ["wan21_14b"])
    assert any(hint in note for note in facts["notes"])


def test_image_keys_belong_to_image_to_video_alone(tmp_path, capsys):
    file = lora(tmp_path / "a.safetensors", 5120, "wan_2.1", names=ATTENTION + IMAGE)
    status, facts = report(capsys, str(file), "--model", "wan21_14b")
    assert (status, len(facts["why_not"])) == (1, 1)
    assert "add_k_proj is not in this model" in facts["why_not"][0] and "image keys" in facts["why_not"][0]


def test_a_block_that_the_model_does_not_have_does_not_fit(tmp_path, capsys):
    _, facts = report(capsys, str(lora(tmp_path / "a.safetensors", 1536, blocks=(0, 30))), "--model", "wan21_1b")
    assert "blocks.30.attn2.to_k is not in this model" in facts["why_not"][0]


def test_without_a_model_a_file_that_fits_none_is_status_1(tmp_path, capsys):
    status, facts = report(capsys, str(lora(tmp_path / "a.safetensors", 4096, blocks=(0,))))
    assert (status, facts["fits"]) == (1, [])


def test_everything_the_trainer_noted_is_told(tmp_path, capsys):
    file = lora(tmp_path / "x_high_noise.safetensors", 5120, "wan_2.2_14b", rank=4, trigger_word="p3r5on")
    _, facts = report(capsys, str(file))
    expected = {
        "kind": "LoRA",
        "ranks": [4],
        "keys": 32,
        "layers": 16,
        "blocks": 40,
        "hidden_size": 5120,
        "side": "high",
        "dtypes": ["F16"],
        "base_model_version": "wan_2.2_14b",
        "trainer": "ai-toolkit",
        "trainer_version": "0.12.26",
        "step": 1500,
        "epoch": 3,
        "trigger_word": "p3r5on",
        "bytes": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    assert {name: facts[name] for name in expected} == expected


@pytest.mark.parametrize(("version", "era"), [("0.9.2", "unipc"), ("0.9.3", "flowmatch"), ("0.12.26", "flowmatch")])
def test_the_version_gives_the_era_of_the_sampler(version, era, tmp_path, capsys):
    _, facts = report(capsys, str(lora(tmp_path / "a.safetensors", 1536, "wan_2.1", version=version)))
    assert (facts["era"], facts["era_because"]) == (era, f"the LoRA was made by ai-toolkit {version}")


def test_the_reader_is_told_how_the_previews_were_made(tmp_path, capsys):
    file = lora(tmp_path / "a_low_noise.safetensors", 5120, "wan_2.2_14b")
    main([str(file), "--model", "wan22_14b_i2v"])
    text = capsys.readouterr().out
    assert "FlowMatch Euler, shift 5, boundary 0.875" in text
    assert "It fits wan22_14b_i2v." in text


def test_the_names_of_diffusers_and_kohya_are_understood(tmp_path, capsys):
    ones = {"down": np.ones((2, 1536), np.float16), "up": np.ones((1536, 2), np.float16)}
    for number, layer in enumerate(("transformer.blocks.0.attn1.to_q", "lora_unet_blocks_0_self_attn_q")):
        file = tmp_path / f"{number}.safetensors"
        save_file({f"{layer}.lora_{half}.weight": tensor for half, tensor in ones.items()}, file)
        _, facts = report(capsys, str(file))
        assert facts["fits"] == ["wan21_1b"]


@pytest.mark.parametrize("names", [["ffn.0"], ["ffn.2"]])
def test_feed_forward_layers_alone_tell_the_width(names, tmp_path, capsys):
    ins, outs = (1536, 8960) if names == ["ffn.0"] else (8960, 1536)
    key = f"diffusion_model.blocks.0.{names[0]}"
    pair = {f"{key}.lora_A.weight": np.ones((2, ins), np.float16), f"{key}.lora_B.weight": np.ones((outs, 2), np.float16)}
    save_file(pair, tmp_path / "a.safetensors")
    assert report(capsys, str(tmp_path / "a.safetensors"))[1]["hidden_size"] == 1536


@pytest.mark.parametrize("whole", [True, False])
def test_the_size_of_a_lokr_is_that_of_its_kronecker_product(whole, tmp_path, capsys):
    layer = "diffusion_model.blocks.0.self_attn.q"
    tensors = {f"{layer}.lokr_w1": np.ones((4, 4), np.float16), f"{layer}.alpha": np.ones((), np.float16)}
    if whole:
        tensors[f"{layer}.lokr_w2"] = np.ones((384, 384), np.float16)
    else:
        tensors |= {f"{layer}.lokr_w2_a": np.ones((384, 8), np.float16), f"{layer}.lokr_w2_b": np.ones((8, 384), np.float16)}
    save_file(tensors, tmp_path / "a.safetensors")
    status, facts = report(capsys, str(tmp_path / "a.safetensors"), "--model", "wan21_1b")
    assert (status, facts["kind"], facts["ranks"]) == (0, "LoKr", [] if whole else [8])
    assert any("which an adapter cannot carry, so it is merged" in note for note in facts["notes"])


def test_a_kind_that_the_worker_does_not_take_fits_no_model(tmp_path, capsys):
    save_file({"diffusion_model.blocks.0.self_attn.q.hada_w1_a": np.ones((2, 5120), np.float16)}, tmp_path / "a.safetensors")
    status, facts = report(capsys, str(tmp_path / "a.safetensors"))
    assert (status, facts["fits"]) == (1, [])
    assert facts["refusal"].startswith("this is a LoHa file")


def test_both_sides_in_one_file_are_a_file_for_the_models_with_two_transformers(tmp_path, capsys):
    layer = "diffusion_model.transformer_{}.blocks.0.self_attn.q.lora_{}.weight"
    shapes = {"A": (2, 5120), "B": (5120, 2)}
    save_file({layer.format(n, h): np.ones(shapes[h], np.float16) for n in (1, 2) for h in "AB"}, tmp_path / "a.safetensors")
    status, facts = report(capsys, str(tmp_path / "a.safetensors"))
    assert (status, facts["kind"]) == (0, "LoRA, high and low side in one file")
    assert facts["fits"] == ["wan22_14b_i2v", "wan22_14b_t2v"]


@pytest.mark.parametrize("model_id", MODELS)
def test_the_shapes_are_those_of_the_real_transformers(model_id):
    with torch.device("meta"):
        real = real_size.transformer(model_id)
    assert shapes_of(model_id) == {name: tuple(value.shape) for name, value in real.named_parameters()}


FILES_OF_THE_ZOO = {
    **lora_zoo.spellings(),
    **{name: file for name, (file, _) in lora_zoo.strengths().items()},
    **lora_zoo.merged(),
    **{name: file for name, file in lora_zoo.bad().items() if name != "NaN"},  # the header does not tell
}


@pytest.mark.parametrize("name", FILES_OF_THE_ZOO)
def test_the_worker_and_the_tool_come_to_one_verdict(name, tiny, tmp_path, capsys, monkeypatch):
    tensors, header = FILES_OF_THE_ZOO[name]
    save_torch({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "a.safetensors", header or None)
    model = load_pipeline("wan21_1b", tiny, "cpu")
    monkeypatch.setattr(inspect_lora, "shapes_of", lambda _: model.loras._shapes)
    status, facts = report(capsys, str(tmp_path / "a.safetensors"), "--model", "wan21_1b")
    warnings, refusals = [], []
    try:
        warnings = model.loras.check(Adapter(LoraFile.read(tmp_path / "a.safetensors")))
    except LoraError as error:
        refusals = [str(error)]
    assert (status, facts["why_not"]) == (len(refusals), refusals)
    assert set(warnings) <= set(facts["notes"])


def test_a_file_that_is_no_lora_is_one_line_on_stderr(tmp_path, capsys):
    (tmp_path / "page.safetensors").write_text("<html>")
    for path, words in ((tmp_path / "page.safetensors", "web page"), (tmp_path / "none", "No such file"), (tmp_path, "folder")):
        assert main([str(path)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.startswith("inspect_lora: ") and error.count("\n") == 1


def test_no_torch_is_needed(tmp_path):
    file = lora(tmp_path / "a.safetensors", 1536, "wan_2.1")
    code = f"import sys; sys.modules['torch'] = None; from tools.inspect_lora import main; sys.exit(main([{str(file)!r}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    """As `| head` does."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "tools.inspect_lora", str(lora(tmp_path / "a.safetensors", 1536))]
    done = subprocess.run(command, cwd=ROOT, stdout=writes, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")
