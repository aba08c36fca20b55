"""What the families share: Megatron's GPT with a vision tower before it, as one chunk of a pipeline stage."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from nemo_vopd.batch import MicroBatch, Packing
from nemo_vopd.mcore.layers import add_to_main_grad, block_spec
from nemo_vopd.mcore.stage import WeightRule
from nemo_vopd.vlm.language import LAYER_RULES
from nemo_vopd.vlm.layout import padded_vocab_size


class LanguageModel(GPTModel):
    """Megatron's GPT without the head: every stage returns hidden states [S, 1, H].

    The loss applies the head to response rows only (docs/algorithm.md section 7).
    """

    def _postprocess(self, hidden_states: Tensor, **_: object) -> Tensor:  # type: ignore[override]
        return hidden_states


class VisionLanguageModel(MegatronModule):
    """One pipeline chunk; the first one holds the vision tower, replicated over tensor parallelism.

    A family subclasses it with its tower and, where they differ, its language model and layers.
    """

    language_class: type[LanguageModel] = LanguageModel
    layer_class: type[TransformerLayer] = TransformerLayer

    def __init__(
        self,
        hf: Any,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        *,
        layer_spec: str = "auto",
        recompute_vision: bool = False,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        """Build from the Hugging Face config `hf` and Megatron's `config` (see `transformer_config`).

        `vp_stage` is the number of this chunk on its pipeline stage, None without virtual pipelining.
        """
        super().__init__(config=config)
        self.hf, self.groups = hf, groups
        self.pre_process, self.post_process = pre_process, post_process
        self.model_type = ModelType.encoder_or_decoder
        self.image_token_id = hf.image_token_id
        self.share_embeddings_and_output_weights = hf.tie_word_embeddings
        text: Any = hf.text_config
        self.vision = self.build_tower(hf) if pre_process else None
        if self.vision is not None and recompute_vision:
            self.vision.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        if self.vision is not None:  # not `.to`: rotary frequencies, which are buffers, stay float32
            for parameter in self.vision.parameters():
                parameter.data = parameter.data.to(config.params_dtype)
        spec = block_spec(config, layer_spec, pp_rank=groups.pp.rank(), vp_stage=vp_stage, layer_class=self.layer_class)
        self.language = self.language_class(
            config,
            spec,  # type: ignore[arg-type]
            vocab_size=padded_vocab_size(text.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=text.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=hf.tie_word_embeddings,
            position_embedding_type="mrope",
            rotary_base=text.rope_parameters["rope_theta"],
            scatter_embedding_sequence_parallel=False,  # image features are put in first
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        add_to_main_grad(self.language.decoder)
        self._average_gradients_of_copies()

    def _average_gradients_of_copies(self) -> None:
        """Mark what each tensor-parallel rank holds and computes in whole: Megatron then averages its gradients.

        On a GPU they differ in round-off from rank to rank, and the copies of a weight would drift apart. Gradients of
        which a rank has only a part, Megatron sums: of the norms under sequence parallelism, and of those of queries
        and keys (finalize_model_grads.py, _allreduce_non_tensor_model_parallel_grads).
        """
        for name, parameter in self.named_parameters():
            is_part = getattr(parameter, "sequence_parallel", False) or "q_layernorm" in name or "k_layernorm" in name
            if self.weight_rule(name).split == "replicated" and not is_part:
                parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]

    def build_tower(self, hf: Any) -> torch.nn.Module:
        """The vision tower, with weights named as below `visual.` of the Hugging Face model."""
        raise NotImplementedError

    def image_features(self, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What the tower makes of patches [N, D] of images `grid_thw` [num_images, 3], for their n image tokens.

        The first [n, H] are the tokens' embeddings; the others [n, H] are for layers that add them (`layer_class`).
        """
        assert self.vision is not None
        return self.vision(pixel_values, grid_thw), []

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Hidden states from the previous pipeline stage (called by Megatron's schedules)."""
        self.language.set_input_tensor(input_tensor)  # type: ignore[arg-type]

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The embedding's or head's weight that stages share when they are tied (called by Megatron)."""
        return self.language.shared_embedding_or_output_weight()

    def output_weight(self) -> Tensor:
        """[V / tp, H]: this rank's rows of the head, on the last stage."""
        if self.share_embeddings_and_output_weights:
            weight = self.language.shared_embedding_or_output_weight()
        else:
            weight = self.language.output_layer.weight
        assert weight is not None, "the head lives on the last pipeline stage"
        return weight

    def forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        packing: Packing,
        pixel_values: Tensor | None = None,
        grid_thw: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [S, 1, H] of this stage ([S / tp, 1, H] under sequence parallelism).

        Args:
            token_ids: [S], packed.
            position_ids: [3, S] M-RoPE positions of these tokens.
            packing: which of them are one sequence.
            pixel_values: [N, D] patches of all images, once for each prompt; only the first chunk needs them.
            grid_thw: [num_images, 3] patch grids of these images.
        """
        embeddings, added = None, None
        if self.pre_process:
            embeddings, added = self.embed(token_ids, pixel_values, grid_thw, packing)
        return self.language(
            input_ids=token_ids[None],
            position_ids=position_ids[:, None],
            attention_mask=None,
            decoder_input=embeddings,
            packed_seq_params=packing,  # type: ignore[arg-type]
            # the slot of cross-attention: Megatron hands it to every layer, and through recomputation as an input
            extra_block_kwargs={"context": added},
        )

    def embed(
        self, token_ids: Tensor, pixel_values: Tensor | None, grid_thw: Tensor | None, packing: Packing | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings [S, 1, H] and, if the tower has any, K features to add later [S, 1, K, H], zero beside images.

        `packing` tells which sequences share images; without it none do.
        """
        added = None
        embeddings = self.language.embedding(input_ids=token_ids[None], position_ids=None)
        if pixel_values is not None and pixel_values.size(0):
            assert grid_thw is not None
            features, extra = self.image_features(pixel_values.to(embeddings.dtype), grid_thw)
            if packing is not None:
                merge = self.hf.vision_config.spatial_merge_size**2
                features, *extra = (packing.for_sequences(x, merge) for x in (features, *extra))
            is_image = (token_ids == self.image_token_id)[:, None, None]
            embeddings = embeddings.masked_scatter(is_image, features.to(embeddings.dtype))
            if extra:
                zeros = embeddings.new_zeros((token_ids.numel(), 1, len(extra), embeddings.size(-1)))
                added = zeros.masked_scatter(is_image[..., None], torch.stack(extra, dim=1).to(zeros.dtype))
        if self.config.sequence_parallel:
            split = tensor_parallel.scatter_to_sequence_parallel_region
            embeddings = split(embeddings, group=self.groups.tp)
            added = split(added, group=self.groups.tp) if added is not None else None
        return embeddings, added

    def response_hidden(self, hidden: Tensor, batch: MicroBatch) -> Tensor:
        """[T, H]: the rows of `hidden` (this last stage's output) that predict the batch's response tokens."""
        if self.config.sequence_parallel:
            # every rank computes the same loss gradient, so the backward pass splits instead of summing
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.groups.tp
            )
        return hidden[batch.response_rows, 0]

    def weight_rule(self, name: str) -> WeightRule:
        """The Hugging Face tensors of parameter `name` of this module (local and Transformer Engine names)."""
        if name.startswith("vision."):
            return WeightRule(("visual." + name.removeprefix("vision."),), "replicated")
        name = name.removeprefix("language.")
        if name == "output_layer.weight" and self.share_embeddings_and_output_weights:
            # the last stage's copy of the embedding: loaded like it, and exported by the first stage only
            return dataclasses.replace(_ROOT_RULES["embedding.word_embeddings.weight"], export=False)
        if name in _ROOT_RULES:
            return _ROOT_RULES[name]
        # decoder.layers.<local index>.<rest>
        _, _, index, rest = name.split(".", 3)
        number = self.language.decoder.layers[int(index)].layer_number - 1  # type: ignore[operator,index]
        hf_names, split = LAYER_RULES[rest]
        return WeightRule(tuple(f"layers.{number}.{hf_name}" for hf_name in hf_names), split)


_ROOT_RULES = {
    "embedding.word_embeddings.weight": WeightRule(("embed_tokens.weight",), "rows"),
    "output_layer.weight": WeightRule(("lm_head.weight",), "rows"),
    "decoder.final_layernorm.weight": WeightRule(("norm.weight",), "replicated"),
}
