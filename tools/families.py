"""Families of base models as tiny configurations: what docs/models.md and the tests try the engine on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers

from fedlora.tasks import CausalLM, Classification, Examples
from fedlora.tasks.text import TextTask

PAD, END, VOCABULARY, CLASSES = 0, 1, 64, 3
_TOKENS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": END,
    "eos_token_id": END,
    "num_labels": CLASSES,
}
_BERT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 80,
}
_LLAMA: dict[str, Any] = {**_BERT, "num_key_value_heads": 1, "head_dim": 8}
_GPT: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 80}

ENCODERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "ALBERT": ("AlbertConfig", {**_BERT, "embedding_size": 8}),
    "BART": (
        "BartConfig",
        {
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_position_embeddings": 80,
            "decoder_start_token_id": END,
            "forced_eos_token_id": None,
        },
    ),
    "BERT": ("BertConfig", _BERT),
    "BigBird": ("BigBirdConfig", {**_BERT, "attention_type": "original_full"}),
    "CamemBERT": ("CamembertConfig", _BERT),
    "ConvBERT": ("ConvBertConfig", {**_BERT, "embedding_size": 16, "head_ratio": 2, "conv_kernel_size": 3}),
    "DeBERTa": ("DebertaConfig", {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "DeBERTa-v2": (
        "DebertaV2Config",
        {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True},
    ),
    "DistilBERT": (
        "DistilBertConfig",
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 80},
    ),
    "ELECTRA": ("ElectraConfig", {**_BERT, "embedding_size": 16}),
    "ERNIE": ("ErnieConfig", _BERT),
    "FNet": (
        "FNetConfig",
        {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "max_position_embeddings": 80},
    ),
    "Longformer": ("LongformerConfig", {**_BERT, "attention_window": 4, "max_position_embeddings": 130}),
    "MegatronBERT": ("MegatronBertConfig", _BERT),
    "ModernBERT": ("ModernBertConfig", {**_BERT, "local_attention": 8, "classifier_bias": True, "norm_bias": True}),
    "MPNet": ("MPNetConfig", _BERT),
    "Nystromformer": ("NystromformerConfig", {**_BERT, "num_landmarks": 4, "segment_means_seq_len": 4}),
    "RemBERT": ("RemBertConfig", {**_BERT, "input_embedding_size": 16}),
    "RoBERTa": ("RobertaConfig", _BERT),
    "RoFormer": ("RoFormerConfig", {**_BERT, "embedding_size": 16}),
    "T5": (
        "T5Config",
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
    ),
    "XLM-RoBERTa": ("XLMRobertaConfig", _BERT),
    "XLNet": ("XLNetConfig", {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}),
}
"""Classifiers by family: the class of their configuration, and its keys."""

DECODERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "BLOOM": ("BloomConfig", {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "Falcon": (
        "FalconConfig",
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "new_decoder_architecture": False},
    ),
    "Gemma": ("GemmaConfig", _LLAMA),
    "Gemma 2": ("Gemma2Config", {**_LLAMA, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "Gemma 3 (text)": ("Gemma3TextConfig", {**_LLAMA, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "Gemma 3 (with vision)": ("Gemma3Config", {}),
    "GPT-2": ("GPT2Config", _GPT),
    "GPT-J": ("GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "GPT-Neo": (
        "GPTNeoConfig",
        {
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": 80,
        },
    ),
    "GPT-NeoX": ("GPTNeoXConfig", _BERT),
    "Granite": ("GraniteConfig", {**_BERT, "num_key_value_heads": 1}),
    "Llama": ("LlamaConfig", _LLAMA),
    "Mistral": ("MistralConfig", {**_LLAMA, "sliding_window": 8}),
    "Mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": None}),
    "OLMo 2": ("Olmo2Config", {**_BERT, "num_key_value_heads": 1}),
    "OPT": (
        "OPTConfig",
        {
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 24,
            "max_position_embeddings": 80,
        },
    ),
    "Phi": ("PhiConfig", _BERT),
    "Phi-3": ("Phi3Config", {**_BERT, "num_key_value_heads": 1}),
    "Qwen 2": ("Qwen2Config", {**_BERT, "num_key_value_heads": 1}),
    "Qwen 2 MoE": (
        "Qwen2MoeConfig",
        {
            **_BERT,
            "num_key_value_heads": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
        },
    ),
    "Qwen 3": ("Qwen3Config", _LLAMA),
    "StableLM": ("StableLmConfig", {**_BERT, "num_key_value_heads": 1}),
    "StarCoder 2": ("Starcoder2Config", {**_BERT, "num_key_value_heads": 1}),
}
"""Language models by family."""

FAMILIES = {**ENCODERS, **DECODERS}
FLOAT32 = ("Gemma 2", "Mixtral", "Qwen 2 MoE")
"""Families whose own code does not compute in float64."""


def task_of(family: str) -> type[TextTask]:
    """Return the task that a family is tried on."""
    return CausalLM if family in DECODERS else Classification


def tiny_config(family: str) -> Any:
    """Return the family's tiny configuration, without dropout."""
    name, keys = FAMILIES[family]
    if name == "Gemma3Config":
        text = transformers.Gemma3TextConfig(**_TOKENS, **DECODERS["Gemma 3 (text)"][1])
        vision = {**_BERT, "image_size": 14, "patch_size": 7}
        vision.pop("max_position_embeddings")
        return transformers.Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    config = getattr(transformers, name)(**_TOKENS, **keys)
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def tiny_model(family: str, seed: int = 0) -> Any:
    """Return a tiny model in float64 where the family computes in it, every weight random (biases and norms, too)."""
    torch.manual_seed(seed)
    auto_model = getattr(transformers, task_of(family).auto_model)
    model = auto_model.from_config(tiny_config(family)).eval()
    model = model if family in FLOAT32 else model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tiny_rows(family: str, rows: int, seed: int = 0) -> Examples:
    """Return rows of 3 to 20 random tokens, the last two of 60, each with the end that some families ask for."""
    generator = np.random.default_rng(seed)
    lengths = [*generator.integers(3, 21, size=rows - 2), 60, 60]
    tokens = tuple(np.array([*generator.integers(2, VOCABULARY, size=n - 1), END]) for n in lengths)
    if family in DECODERS:
        return Examples(tokens, tuple(np.arange(len(row)) >= 1 for row in tokens))
    return Examples(tokens, generator.integers(0, CLASSES, size=rows).astype(np.int64))
