"""The Linear modules that stay 16-bit because model code looks at their weight, instead of calling the module.

Two forms, and what int8 codes make of them:

- `self.dt_proj.weight @ time_step` multiplies codes where it expects the weight (Mamba).
- `self.weights_proj(x.to(self.weights_proj.weight.dtype))` turns the input itself into int8 (HY-V4's indexer). That
  ends in an error, or silently truncates the input to integers.

The table is by names of classes. `scripts/find_weight_reads --write` derives it from the source of every class of
transformers and torch.nn; a test compares the two, so a new transformers shows what it adds.

Not known: what the code of a checkpoint, or of any class of another name, reads. `int8convert verify` tries the output
on a few tokens, and reports a layer whose weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any

ANY = "*"
"""The part of a path that is an index."""


class ReadKind(StrEnum):
    """What a model's code reads. The value is the reason for which the module stays 16-bit."""

    VALUES = "read by the model's own code"
    DTYPE = "the model's own code casts to its weight's dtype"
    FIRST_DTYPE = "the model's own code casts to the dtype of its first parameter"


READS_VERSION = "5.24.0"
"""Version of transformers whose classes were searched."""
READS: Mapping[ReadKind, Mapping[str, tuple[str, ...]]] = {
    ReadKind.VALUES: {
        "BloomAttention": ("dense",),
        "BloomMLP": ("dense_4h_to_h",),
        "ConditionalDetrMHAttentionMap": ("k_proj",),
        "DabDetrMHAttentionMap": ("k_linear",),
        "DetrMHAttentionMap": ("k_proj",),
        "DisentangledSelfAttention": ("in_proj",),
        "Gemma4AssistantForCausalLM": ("lm_head",),
        "Gemma4Model": ("language_model.embed_tokens",),
        "Gemma4UnifiedAssistantForCausalLM": ("lm_head",),
        "LSHSelfAttention": ("query_key", "value"),
        "LayoutLMv2Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
        "LongcatFlashTopkRouter": ("classifier",),
        "MLCDVisionEmbeddings": ("position_embedding",),
        "MMGroundingDinoModel": ("reference_points",),
        "MambaMixer": ("dt_proj",),
        "MaskFormerDetrMHAttentionMap": ("k_proj",),
        "MobileBertLMPredictionHead": ("decoder", "dense"),
        "Mxfp4GptOssMLP": ("router",),
        "NeoMMEForMaskedLM": ("unembedding_projection",),
        "TDNNLayer": ("kernel",),
        "WavLMAttention": ("k_proj", "out_proj", "q_proj", "v_proj"),
    },
    ReadKind.DTYPE: {
        "AXK2Indexer": ("weights_proj",),
        "Blip2ForImageTextRetrieval": ("itm_head", "text_projection", "vision_projection"),
        "Blip2TextModelWithProjection": ("text_projection",),
        "Blip2VisionModelWithProjection": ("vision_projection",),
        "ColModernVBertForRetrieval": ("embedding_proj_layer",),
        "ColPaliForRetrieval": ("embedding_proj_layer",),
        "ColQwen2ForRetrieval": ("embedding_proj_layer",),
        "Cosmos3EdgeVisionEmbeddings": ("patch_embedding",),
        "DeepseekV32Indexer": ("weights_proj",),
        "DiffusionGemmaGenerationMixin": ("model.decoder.embed_tokens",),
        "Dots3NoteTextIndexer": ("weights_proj",),
        "EdgeTamVisionNeck": ("convs.*",),
        "Ernie4_5_VLMoePatchEmbed": ("proj",),
        "EsmFold2AtomEncoder": ("atom_linear",),
        "EsmFold2ConfidenceHead": ("pae_head",),
        "EsmFold2DiffusionConditioning": ("noise_proj", "pair_proj"),
        "EsmFold2DiffusionModule": ("coords_linear",),
        "EsmFold2InputEmbedder": ("token_bonds",),
        "EsmFold2LanguageModelEncoder": ("pair_proj",),
        "EsmFold2MSAEncoder": ("embed",),
        "EsmFold2RelativePositionEncoding": ("embed",),
        "FalconMambaForCausalLM": ("lm_head",),
        "Florence2VisionBackbone": ("convs.0.conv",),
        "Glm5NextTextIndexer": ("weights_proj",),
        "GlmMoeDsaIndexer": ("weights_proj",),
        "GradiumPhononTTSModel": ("audio_latent_proj", "audio_prompt_proj"),
        "GraniteSpeech5Encoder": ("input_linear",),
        "HYV4ForCausalLM": ("lm_head",),
        "HYV4Indexer": ("weights_proj",),
        "HYV4VLForConditionalGeneration": ("lm_head",),
        "HYV4VLIndexer": ("weights_proj",),
        "Inkling2LoopMessageGate": ("down_proj",),
        "Inkling2VisionModel": ("embeddings.patch_embedding",),
        "JevForDecision": ("proj",),
        "Mamba2ForCausalLM": ("lm_head",),
        "MambaForCausalLM": ("lm_head",),
        "MistralLarge4TextIndexer": ("weights_proj",),
        "MuseGlimmerVisionPatchEmbedder": ("patch_embedding",),
        "MuseSparkVisionPatchEmbedder": ("patch_embedding",),
        "NeoMMEMultiVectorHead": ("proj",),
        "Phi4MultimodalImageEmbedding": ("img_processor.embeddings.patch_embedding",),
        "PocketTTSModel": ("audio_latent_proj", "audio_prompt_proj"),
        "Sam2VisionNeck": ("convs.*",),
        "Siglip2VisionEmbeddings": ("patch_embedding",),
        "UniSpeechForPreTraining": ("project_q",),
        "Wav2Vec2ConformerForPreTraining": ("project_q",),
        "Wav2Vec2ForPreTraining": ("project_q",),
        "_FusedPatchEmbeddingMixin": ("linear_proj",),
        "xLSTMForCausalLM": ("lm_head",),
    },
    ReadKind.FIRST_DTYPE: {
        "HunYuanVLModel": ("vision_tower",),
        "OpenAIGPTModel": ("",),
        "Swin2SRSelfAttention": ("continuous_position_bias_mlp",),
        "Swinv2SelfAttention": ("continuous_position_bias_mlp",),
    },
}
"""What the classes of transformers read, by class: paths."""
TORCH_READS: Mapping[ReadKind, Mapping[str, tuple[str, ...]]] = {
    ReadKind.VALUES: {
        "LinearCrossEntropyLoss": ("linear",),
        "MultiheadAttention": ("out_proj",),
        "TransformerEncoderLayer": ("linear1", "linear2", "self_attn.out_proj"),
    },
}
"""What the classes of torch.nn read, by class: paths."""
CONDITIONS: Mapping[str, Mapping[str, int]] = {
    "BloomAttention": {"pretraining_tp": 2, "slow_but_exact": 1},
    "BloomMLP": {"pretraining_tp": 2, "slow_but_exact": 1},
}
"""Class -> the least values of the module's attributes for which its code reads the weight."""


def modules_with_read_weights(model: Any, reads_of_torch: bool = True) -> dict[str, ReadKind]:
    """Return the full name of each module whose `weight` the code of another module reads, and what is read.

    Args:
        model: on any device, the meta device included; weights are not looked at.
        reads_of_torch: False leaves out the reads of torch's own layers, for callers that replace those layers.
    """
    tables = (READS, TORCH_READS) if reads_of_torch else (READS,)
    found: dict[str, ReadKind] = {}
    for name, module in model.named_modules():
        owners = [owner.__name__ for owner in type(module).__mro__]
        for kind, path in _reads(owners, module, tables):
            for each in _resolve(module, kind, path):
                full_name = f"{name}.{each}" if name else each
                if found.get(full_name) is not ReadKind.VALUES:
                    found[full_name] = kind
    return found


def _reads(
    owners: list[str], module: Any, tables: tuple[Mapping[ReadKind, Mapping[str, tuple[str, ...]]], ...]
) -> Iterator[tuple[ReadKind, str]]:
    for owner in owners:
        conditions = CONDITIONS.get(owner, {})
        if all(getattr(module, attribute, 0) >= least for attribute, least in conditions.items()):
            yield from ((kind, path) for table in tables for kind in table for path in table[kind].get(owner, ()))


def _resolve(module: Any, kind: ReadKind, path: str) -> Iterator[str]:
    """Yield the paths from a module to those whose weight a row of the table means."""
    pattern = re.compile(re.escape(path).replace(re.escape(ANY), r"[^.]+"))
    for found, child in module.named_modules():
        if not pattern.fullmatch(found):
            continue
        if kind is not ReadKind.FIRST_DTYPE:
            yield found
            continue
        first = next((name for name, _ in child.named_parameters(prefix=found)), "")
        if first.endswith(".weight"):
            yield first.removesuffix(".weight")
