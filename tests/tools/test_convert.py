"""Export and import: a directory that transformers loads like the original, and the same bits back."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from nemo_vopd.errors import OptionError
from nemo_vopd.mcore import parallel
from nemo_vopd.tools.convert import export_checkpoint, import_model
from nemo_vopd.tools.model_card import model_card
from nemo_vopd.tools.prepare.tiny_model import write_tiny_model
from nemo_vopd.vlm.build import build_vlm
from nemo_vopd.vlm.weights.export import iterate_hf, save_hf
from nemo_vopd.vlm.weights.names import canonical
from nemo_vopd.vlm.weights.reading import HFReader
from tests.distributed import run_distributed
from tests.helpers import tiny_config

README = """---
license: other
license_name: tiny-licence
license_link: LICENSE
---
# Tiny
"""
FREEZE = ["model.freeze.vision=true"]
SHARD = "800KB"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A tiny bf16 model in several files, whose vocabulary does not divide by anything."""
    folder = tmp_path_factory.mktemp("source")
    write_tiny_model(folder / "float", seed=6, vocab_size=131)
    shutil.copytree(folder / "float", folder / "bf16")
    (folder / "bf16" / "model.safetensors").unlink()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "float", dtype=torch.bfloat16)
    model.save_pretrained(folder / "bf16", max_shard_size=SHARD)
    assert len(list((folder / "bf16").glob("*.safetensors"))) > 1
    (folder / "bf16" / "README.md").write_text(README)
    return folder / "bf16"


def train_and_collect(config):
    """Train; weights of student and teacher of this pipeline stage by canonical name, and the frozen ones' change."""
    from nemo_vopd.training.run import train

    model = train(config)
    return [
        {name: tensor.clone() for name, tensor in iterate_hf(module, model.groups)}
        for module in (model.student, model.teacher_model)
    ]


@pytest.fixture(scope="module")
def trained(source, assets, tmp_path_factory):
    """A run in four processes with a frozen tower; its folder and its weights."""
    folder = tmp_path_factory.mktemp("trained")
    layout = ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.pipeline_layout=[1,2]"]
    options = ["precision=bf16", "optimizer.lr=1e-2", "distill.teacher.rate=0.5", "checkpoint.every_n_steps=2"]
    config = tiny_config(assets, folder, f"model.hf_path={source}", "trainer.max_steps=2", *layout, *options, *FREEZE)
    stages = run_distributed(train_and_collect, 4, config)
    weights = [{}, {}]
    for stage in stages:
        for whole, part in zip(weights, stage, strict=True):
            whole.update(part)
    return folder, weights


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {canonical(n): t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


@pytest.mark.parametrize("kind", ["student", "teacher"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_export_holds_the_trained_weights(kind, world_size, trained, source, assets, tmp_path):
    folder, (student, teacher) = trained
    expected = {"student": student, "teacher": teacher}[kind]
    config = tiny_config(assets, tmp_path, "model.hf_path=''")
    checkpoint, output = folder / "checkpoints" / "last", tmp_path / "export"
    if world_size == 1:
        export_checkpoint(config, checkpoint, kind, output)
    else:
        run_distributed(export_checkpoint, world_size, config, checkpoint, kind, output)
    assert sorted(p.name for p in output.iterdir()) == sorted(p.name for p in source.iterdir())
    exported, original = tensors_of(output), tensors_of(source)
    assert exported.keys() == original.keys()
    for name, tensor in exported.items():
        assert tensor.dtype == original[name].dtype and torch.equal(tensor, expected[name]), name
    changed = {name for name in exported if not torch.equal(exported[name], original[name])}
    frozen = {name for name in exported if name.startswith("visual.") and "merger" not in name}
    assert frozen and not changed & frozen and len(changed) > 20
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(output)
    assert model.dtype == torch.bfloat16


def test_student_and_teacher_differ(trained):
    _, (student, teacher) = trained
    assert any(not torch.equal(student[name], teacher[name]) for name in student)


def test_an_interrupted_export_goes_on_where_it_stopped(trained, assets, tmp_path):
    folder, _ = trained
    config, checkpoint = tiny_config(assets, tmp_path, "model.hf_path=''"), folder / "checkpoints" / "last"
    export_checkpoint(config, checkpoint, "student", tmp_path / "whole")
    partial = tmp_path / "again.partial"
    shutil.copytree(tmp_path / "whole", partial)
    files = sorted(partial.glob("*.safetensors"))
    mark = {"checkpoint": str(checkpoint.resolve()), "weights": "student"}
    (partial / ".export.json").write_text(json.dumps(mark))
    files[0].unlink()
    before = os.stat(files[1]).st_mtime_ns, os.stat(files[1]).st_ino
    export_checkpoint(config, checkpoint, "student", tmp_path / "again")
    again = tmp_path / "again" / files[1].name
    assert (os.stat(again).st_mtime_ns, os.stat(again).st_ino) == before, "written again"
    assert tensors_of(tmp_path / "again").keys() == tensors_of(tmp_path / "whole").keys()
    assert not (tmp_path / "again" / ".export.json").exists()


@pytest.mark.parametrize("world_size,layout", [(1, []), (2, ["parallel.tensor=2"]), (3, ["parallel.pipeline=3"])])
def test_what_is_imported_is_exported_bit_for_bit(world_size, layout, source, assets, tmp_path):
    config = tiny_config(assets, tmp_path, f"model.hf_path={source}", "precision.dtype=auto", *layout)
    run_distributed(import_model, world_size, config, tmp_path / "checkpoint")
    export_checkpoint(config, tmp_path / "checkpoint", "teacher", tmp_path / "export")
    exported, original = tensors_of(tmp_path / "export"), tensors_of(source)
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)
    assert (tmp_path / "export" / "README.md").read_text() == README  # there is no run to write about


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_an_export_of_a_run_has_a_model_card(kind, trained, source, assets, tmp_path):
    folder, _ = trained
    config = tiny_config(assets, tmp_path, "model.hf_path=''")
    export_checkpoint(config, folder / "checkpoints" / "last", kind, tmp_path / "export")
    card = ModelCard.load(tmp_path / "export" / "README.md")
    assert card.data.to_dict() == {
        "base_model": "bf16", "library_name": "transformers", "pipeline_tag": "image-text-to-text",
        "tags": ["vision-opd", "self-distillation", "arxiv:2605.18740"],
        "license": "other", "license_name": "tiny-licence", "license_link": "LICENSE",
    }  # fmt: skip
    assert "# bf16 after 2 steps of Vision-OPD" in card.text and f"the weights of the {kind}" in card.text
    assert f"- Weights: {kind}, step 2 of 2\n" in card.text and "- Base model: bf16\n" in card.text
    assert "- Licence: other, tiny-licence, LICENSE, as that of the base model" in card.text
    prepared = json.loads((assets / "tiny-digits" / "data_card.json").read_text())
    counts = f"({prepared['kept']} kept, 0 dropped, {prepared['kept']} with a box)"
    assert f"- Data set: tiny-digits, {prepared['kept']} records, prepared from data.jsonl {counts}, " in card.text
    assert "the median box covers " in card.text and f"torch {torch.__version__.split('+')[0]}, " in card.text
    for option in (
        "distill.teacher.kind=ema",
        "distill.teacher.rate=0.5",
        "optimizer.lr=0.01",
        "distill.add_tail=true",
    ):
        assert f"\n{option}\n" in card.text
    assert "\nmodel.freeze.vision=true\n" in card.text and "distill.teacher.every" not in card.text
    for place in (source.parent, assets, folder, Path.home()):
        assert str(place) not in card.content


def test_a_card_says_what_it_does_not_know(trained, source, tmp_path):
    folder, _ = trained
    manifest = json.loads((folder / "checkpoints" / "last" / "manifest.json").read_text())
    cached = tmp_path / "models--Some--Tiny-VL" / "snapshots" / "0123abcd"
    cached.mkdir(parents=True)

    def card(**data) -> ModelCard:
        changed = {**manifest, "config": {**manifest["config"], "data": {**manifest["config"]["data"], **data}}}
        return ModelCard(model_card(changed, "student", cached))

    for readme in (None, "# no front matter", "---\n[1]\n---\n", "---\na: [\n---\n", "---\nlicense:\n---\n", "\udc80"):
        if readme is not None:
            (cached / "README.md").write_bytes(readme.encode(errors="surrogateescape"))
        found = card()
        assert found.data.base_model == "Some/Tiny-VL" and found.data.license is None
        assert "- Licence: unknown; " in found.text
    assert "- Base model: Some/Tiny-VL, in the directory 0123abcd\n" in found.text
    (cached / "README.md").write_text("---\nmodel_name: 'Tiny: the model'\nlicense: mit\n---\n")
    assert (card().data.base_model, card().data.license) == ("Some/Tiny-VL", "mit")
    assert "# Tiny: the model after 2 steps" in card().text
    gone = card(path=str(tmp_path / "people" / "photographs" / "train")).text
    assert "- Data set: photographs/train, of an unknown number of records" in gone and "people" not in gone
    copy = shutil.copytree(manifest["config"]["data"]["path"], tmp_path / "digits")
    num = json.loads((copy / "data_card.json").read_text())["kept"]
    assert f"- Data set: digits, {num} records, prepared from data.jsonl ({num} kept, " in card(path=str(copy)).text
    (copy / "data_card.json").write_text("{}")
    assert f"- Data set: digits, {num} records\n" in card(path=str(copy)).text
    index = copy / ".nv-meta" / ".info.json"
    index.write_text(index.read_text() + " ")
    assert "- Data set: digits, which has changed since\n" in card(path=str(copy)).text


def save(config, output: Path) -> None:
    """The model of `config` as the quickstart and vLLM's folder get it."""
    os.umask(0o026)
    groups = parallel.initialize(config.parallel, seed=config.seed)
    save_hf(build_vlm(config, groups), groups, config.model.hf_path, output)


def test_files_and_folders_have_the_mode_of_the_umask(trained, source, assets, tmp_path):
    folder, _ = trained
    for file in shutil.copytree(source, tmp_path / "private").iterdir():
        file.chmod(0o600)
    config = tiny_config(assets, tmp_path, f"model.hf_path={tmp_path}/private")
    before = os.umask(0o026)
    try:
        export_checkpoint(config, folder / "checkpoints" / "last", "student", tmp_path / "export")
    finally:
        os.umask(before)
    run_distributed(save, 1, config, tmp_path / "saved")
    for written in (tmp_path / "export", tmp_path / "saved"):
        assert len(list(written.glob("*.safetensors"))) and (written / "config.json").is_file()
        assert {file.stat().st_mode & 0o777 for file in written.iterdir()} == {0o640}
        assert written.stat().st_mode & 0o777 == 0o751


def test_a_tied_head_that_is_stored_follows_the_embedding(assets, tmp_path):
    write_tiny_model(tmp_path / "tied", seed=6, tie_word_embeddings=True)
    file = tmp_path / "tied" / "model.safetensors"
    tensors = load_file(file)
    embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    save_file({**tensors, "lm_head.weight": tensors[embedding].clone()}, str(file))
    config = tiny_config(
        assets, tmp_path / "run", f"model.hf_path={tmp_path}/tied", "trainer.max_steps=1", "checkpoint.every_n_steps=1"
    )
    run_distributed(train_and_collect, 1, config)
    export_checkpoint(config, tmp_path / "run" / "checkpoints" / "last", "student", tmp_path / "export")
    exported = tensors_of(tmp_path / "export")
    assert not torch.equal(exported["embed_tokens.weight"], tensors[embedding])
    assert torch.equal(exported["lm_head.weight"], exported["embed_tokens.weight"])


def test_requests_that_cannot_be_served(trained, assets, tmp_path):
    folder, _ = trained
    config = tiny_config(assets, tmp_path)  # another model
    with pytest.raises(OptionError, match="is another model than the checkpoint's"):
        export_checkpoint(config, folder / "checkpoints" / "last", "student", tmp_path / "export")
    with pytest.raises(OptionError, match="is not a checkpoint of this program"):
        export_checkpoint(config, folder, "student", tmp_path / "export")
    assert not (tmp_path / "export").exists()


def damage(folder: Path, change) -> None:
    file = next(iter(sorted(folder.glob("*.safetensors"))))
    tensors = load_file(file)
    change(tensors, next(name for name in sorted(tensors) if name.endswith("mlp.up_proj.weight")))
    save_file(tensors, str(file))


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t, name: t.pop(name), r"lacks layers.\d.mlp.up_proj.weight; check that config.json"),
        (lambda t, name: t.update(extra=t[name].clone()), "holds unknown extra; check that config.json"),
        (
            lambda t, name: t.update({name: t[name][:-2].clone()}),
            r"up_proj.weight \(190, 64\) where config.json asks for \(192, 64\)",
        ),
        (lambda t, name: t.update({name: t[name][:, :-2].clone()}), r"up_proj.weight \(192, 62\) where config"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, assets, tmp_path):
    shutil.copytree(assets / "tiny-vlm", tmp_path / "vlm")
    damage(tmp_path / "vlm", change)
    config = tiny_config(assets, tmp_path, f"model.hf_path={tmp_path}/vlm", "parallel.tensor=2")
    with pytest.raises(RuntimeError, match=rf"OptionError: model.hf_path=\S+: .*{message}"):
        run_distributed(import_model, 2, config, tmp_path / "checkpoint")


def test_the_reader_reads_only_what_is_asked_for(source):
    reader = HFReader(source)
    whole = reader.read("layers.0.mlp.up_proj.weight")
    assert torch.equal(reader.read("layers.0.mlp.up_proj.weight", start=3, stop=7), whole[3:7])
    assert torch.equal(reader.read("layers.0.mlp.up_proj.weight", dim=1, start=2, stop=5), whole[:, 2:5])
    assert reader.shape("layers.0.mlp.up_proj.weight") == tuple(whole.shape)
