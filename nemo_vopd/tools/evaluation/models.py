"""The two ways to ask a model: the native engine on this process group, or a server."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from nemo_vopd.batch import View
from nemo_vopd.config import Config, PixelConfig
from nemo_vopd.data.processor import Processor
from nemo_vopd.mcore import parallel
from nemo_vopd.rollout.native.engine import Decoder
from nemo_vopd.tools.evaluation.answers import Model, NotAnswered, Request
from nemo_vopd.tools.evaluation.endpoint import Content, Endpoint, image_content, text_content
from nemo_vopd.tools.evaluation.gap import greedy
from nemo_vopd.tools.evaluation.options import EndpointConfig
from nemo_vopd.views import UnusableSample
from nemo_vopd.vlm.build import build_vlm

_NUM_BLOCKS, _BLOCK_BYTES = 16, 1 << 16


class NativeModel(Model):
    """The model of `config.model.hf_path` on Megatron-Core; data-parallel ranks share the questions."""

    def __init__(self, config: Config, groups: ProcessGroupCollection) -> None:
        """Build the model in any layout; images are resized as in training, by data.full and data.crop_pixels."""
        self.processor = Processor.from_pretrained(config.model.hf_path)
        self.decoder = Decoder(build_vlm(config, groups), groups, config.rollout.max_batch_tokens)
        self.params = greedy(self.processor, config.rollout.max_response_length)
        self.pixels: dict[str, PixelConfig] = {"full": config.data.full, "crop": config.data.crop_pixels}
        self._group, self._folder = groups.dp_cp, Path(config.model.hf_path)
        self.num_shares, self.share = self._group.size(), self._group.rank()
        self.collects = parallel.is_rank_zero()

    def __call__(self, requests: list[Request]) -> list[str | NotAnswered]:
        """A reply to each request, or why the processor refuses it."""
        replies: dict[int, str | NotAnswered] = {}
        views: dict[int, View] = {}
        for place, request in enumerate(requests):
            try:
                pixels = [self.pixels[request.view]]
                views[place] = self.processor.view([request.image()], request.question.prompt, pixels)
            except UnusableSample as unusable:
                replies[place] = NotAnswered(str(unusable))
        names = [requests[place].name for place in views]
        for place, answers in zip(views, self.decoder(list(views.values()), names, self.params), strict=True):
            replies[place] = self.processor.decode(answers[0][0])
        return [replies[place] for place in range(len(requests))]

    def fingerprint(self) -> str:
        """A hash of samples of the weight files: an export to the same folder changes it."""
        return weights_fingerprint(self._folder)

    def from_collector[AnyT](self, value: AnyT) -> AnyT:
        """The value of rank 0."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather[AnyT](self, part: AnyT) -> list[AnyT]:
        """The parts of all data-parallel ranks."""
        parts: list[Any] = [None] * self.num_shares
        dist.all_gather_object(parts, part, group=self._group)
        return parts


def weights_fingerprint(folder: Path) -> str:
    """A hash of the sizes of the weight files in `folder` and of some blocks of each, quickly read."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for part in range(_NUM_BLOCKS):
                stream.seek(max(0, size - _BLOCK_BYTES) * part // (_NUM_BLOCKS - 1))
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]


class ServedModel(Model):
    """A model behind an OpenAI-compatible server, which resizes images itself."""

    def __init__(self, options: EndpointConfig, max_tokens: int) -> None:
        """Replies have at most `max_tokens` tokens. Raises OptionError."""
        self.endpoint, self.max_tokens = Endpoint(options, "server"), max_tokens

    def __call__(self, requests: list[Request]) -> Iterator[str | NotAnswered]:
        """The replies as they come. Raises RunError."""

        def content(request: Request) -> Content:
            return [image_content(*request.file()), text_content(request.question.prompt)]

        return self.endpoint.ask_all([partial(content, request) for request in requests], self.max_tokens)
