"""Opens the tokenizer, image processor and chat template of a model directory, and refuses what cannot be right.

`AutoProcessor` is avoided: its video part needs torchvision. The tokenizer and the image processor (Pillow backend) do
not, and both views go through the same one.
"""

from __future__ import annotations

import gc
import math
import os
import reprlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from nemo_vopd.errors import OptionError
from nemo_vopd.hf_directory import one_line, read_config, read_json, refusal

_GIVE = "give the directory of a Hugging Face vision-language model"
_PUBLISHED = "use the file of the model's publisher"
_IMAGE_PROCESSORS = {
    f"{family}ImageProcessor{kind}" for family in ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL") for kind in ("", "Fast", "Pil")
}
"""Names that files give to the one image processor that these families share."""


class Parts(NamedTuple):
    """What a directory holds beside the weights."""

    path: str
    tokenizer: Any
    image_processor: Any
    hf: Any
    """The model's configuration."""
    end_token_ids: list[int]
    """Ids that end a response; the first is the one written after an answer."""


def open_parts(hf_path: str | Path) -> Parts:
    """Load what the directory `hf_path` holds beside the weights. Raises OptionError that names file and rule."""
    path = Path(hf_path)
    hf = read_config(path)
    if not hasattr(hf, "image_token_id") or not hasattr(hf, "vision_config"):
        raise refusal(path, "is not a vision-language model (config.json)", _GIVE)
    names = ("tokenizer.json", "vocab.json")
    if not any((path / name).is_file() for name in names):
        raise refusal(path, f"has no {' or '.join(names)}", _GIVE)
    tokenizer = _open_tokenizer(path)
    vocabulary = tokenizer.get_vocab()
    name = getattr(tokenizer, "image_token", None) or "<|image_pad|>"  # as transformers' processors have it
    if vocabulary.get(name) is None:
        raise refusal(path, f"holds a tokenizer without the image token {name}", _PUBLISHED)
    if hf.image_token_id != vocabulary[name]:
        what = f"config.json: image_token_id={reprlib.repr(hf.image_token_id)} is not the tokenizer's image token"
        raise refusal(path, f"{what} {name}, which is {vocabulary[name]}", "correct it, or copy the model again")
    highest = max(vocabulary.values())
    if highest >= hf.text_config.vocab_size:
        what = f"tokenizer.json has token id {highest}, and config.json has vocab_size={hf.text_config.vocab_size}"
        raise refusal(path, what, "give a model whose embedding was enlarged with its tokenizer")
    image_processor = _open_image_processor(path, hf)
    return Parts(str(hf_path), tokenizer, image_processor, hf, _end_token_ids(path, tokenizer, highest))


def _open_tokenizer(path: Path) -> Any:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (path / name).is_file():
            read_json(path, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the formats are many, and so are their errors
        raise refusal(path, f"holds a tokenizer that cannot be read ({one_line(error)})", _PUBLISHED) from None
    # The processor's template goes before the tokenizer's, which is text-only in some releases. The order is that of
    # transformers' ProcessorMixin.get_processor_dict; chat_template.jinja is the tokenizer's too.
    for name in ("processor_config.json", "chat_template.json"):
        if (path / name).is_file() and (template := read_json(path, name).get("chat_template")) is not None:
            tokenizer.chat_template = template
            break
    if not tokenizer.chat_template:
        raise refusal(path, "has no chat template", "use the instruction-tuned model")
    return tokenizer


def _open_image_processor(path: Path, hf: Any) -> Any:
    """The image processor; its patches are those of the tower of the configuration `hf`."""
    vision, (file, settings) = hf.vision_config, _image_settings(path)
    kind = settings.get("image_processor_type")
    if kind is None and (old := settings.get("feature_extractor_type")) is not None:
        kind = str(old).replace("FeatureExtractor", "ImageProcessor")
    if kind is None:
        kind = getattr(hf, "image_processor_type", None)
    if kind is not None and not (isinstance(kind, str) and kind in _IMAGE_PROCESSORS):
        raise refusal(
            path,
            f"{file} asks for the image processor {kind}",
            f"one of {', '.join(sorted(_IMAGE_PROCESSORS))} is needed",
        )
    try:
        processor = Qwen2VLImageProcessorPil.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise refusal(path, f"{file} cannot be used ({one_line(error)})", _PUBLISHED) from None
    for name, of_tower in (
        ("patch_size", vision.patch_size),
        ("temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", vision.spatial_merge_size),
    ):
        value = getattr(processor, name)
        if type(value) is not int or value != of_tower:
            what = f"{file} has {name}={value!r}, and the vision tower of config.json {of_tower!r}"
            raise refusal(path, what, _PUBLISHED)
    size: Any = processor.size
    edges = [size.get(name) for name in ("shortest_edge", "longest_edge")]
    if not all(type(edge) is int for edge in edges) or not 1 <= edges[0] <= edges[1]:
        what = f"{file} has the size {dict(size)}"
        rule = "shortest_edge and longest_edge (or min_pixels and max_pixels) must be numbers of pixels in this order"
        raise refusal(path, f"{what}, and {rule}", _PUBLISHED)
    if not processor.do_resize:
        what = f"{file} has do_resize=false: images would not fit the tower's patches"
        raise refusal(path, what, "set it to true; data.full and data.crop_pixels set the sizes")
    return processor


def _image_settings(path: Path) -> tuple[str, dict[str, Any]]:
    """(file, settings) of the image processor: a part of processor_config.json, or a file of their own."""
    combined, own = "processor_config.json", "preprocessor_config.json"
    if (path / combined).is_file():
        settings = read_json(path, combined).get("image_processor")
        if isinstance(settings, dict):
            return combined, settings
        if settings is not None:
            raise refusal(path, f"{combined} has an image_processor that is no JSON object", _PUBLISHED)
    if not (path / own).is_file():
        raise refusal(path, f"has no {own}, and no {combined} with an image processor", _GIVE)
    return own, read_json(path, own)


def _end_token_ids(path: Path, tokenizer: Any, highest: int) -> list[int]:
    """Ids that end a response, the tokenizer's own one first.

    generation_config.json names them, or config.json where that file is missing (transformers' `GenerationMixin`), else
    the tokenizer.
    """
    file = "generation_config.json" if (path / "generation_config.json").is_file() else "config.json"
    content = read_json(path, file)
    given = content.get("eos_token_id")
    if given is None and isinstance(text := content.get("text_config"), dict):
        given = text.get("eos_token_id")
    ids = [] if given is None else given if isinstance(given, list) else [given]
    if not all(type(one) is int and 0 <= one <= highest for one in ids):
        raise refusal(path, f"{file} has eos_token_id={given}, which is no token of the tokenizer", _PUBLISHED)
    own = tokenizer.eos_token_id
    if not ids and own is None:
        raise refusal(path, "names no end token", "add eos_token_id to generation_config.json")
    return ids or [own] if own not in ids else [own] + [i for i in ids if i != own]


@contextmanager
def refused_by_name(path: str, what: str, seconds: float) -> Iterator[None]:
    """Turn whatever goes wrong in the block into an OptionError that says `what` was tried; it may take `seconds`.

    The limit holds in the main thread, which is where models are opened.
    """
    try:
        with time_limit(seconds):
            yield
    except OptionError:
        raise
    except TimeoutError:
        raise refusal(path, f"{what} does not end within {seconds:g} seconds", _PUBLISHED) from None
    except Exception as error:  # templates and settings are programs of other people
        raise refusal(path, f"{what} ends in an error ({one_line(error)})", _PUBLISHED) from None


def check_ends(path: str, what: str, act: Callable[[], Any], seconds: float) -> None:
    """Raise OptionError, which says `what` was tried, unless `act` comes to an end or an error within `seconds`.

    It runs in a process of its own, which the kernel ends: Python cannot interrupt one operation such as 9**9**9. No
    other end of that process counts: whoever calls `act` next meets what was wrong.
    """
    collecting = gc.isenabled()
    gc.disable()  # in the child it would destroy objects whose threads, those of process groups, are not there
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            act()
        finally:
            os._exit(0)
    if collecting:
        gc.enable()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        raise refusal(path, f"{what} does not end within {seconds:g} seconds", _PUBLISHED)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after `seconds`, if this is the main thread and Python can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(*_: object) -> None:
        raise TimeoutError(f"no end within {seconds:g} seconds")

    handler = signal.signal(signal.SIGALRM, expire)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def check_patches(path: str, values: Any, grid: list[int], hf: Any) -> None:
    """Raise OptionError unless patches `values` [N, D] of one image with `grid` (t, h, w) are what the tower takes."""
    vision = hf.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    if tuple(values.shape) != (math.prod(grid), width):
        what = (
            f"its image processor makes patches {tuple(values.shape)} where the tower takes {(math.prod(grid), width)}"
        )
        raise refusal(path, what, _PUBLISHED)
    if not values.isfinite().all():
        what = "its image processor (image_mean, image_std, rescale_factor) makes pixels that are not finite"
        raise refusal(path, what, _PUBLISHED)
