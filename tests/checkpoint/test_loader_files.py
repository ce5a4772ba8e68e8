"""Which files loaders read, and which they take as weights."""

from __future__ import annotations

import pytest

from int8convert.checkpoint.loader_files import is_inert


@pytest.mark.parametrize(
    "name",
    [
        *("README.md", "readme.MD", "docs/usage.md", "LICENSE", "LICENSE.txt", "License", "LICENSE-MIT", "NOTICE.txt"),
        *("llama_license.md", "image.png", "figures/Loss.JPG", "paper.pdf", "1_Pooling/readme.md"),
        *(".gitattributes", ".gitignore", ".DS_Store", ".git/config", ".cache/huggingface/download/config.json"),
    ],
)
def test_names_that_no_loader_reads(name: str) -> None:
    assert is_inert(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "config.json",
            "model.safetensors",
            "pytorch_model.bin",
            "tokenizer.model",
            "vocab.txt",
            "chat_template.jinja",
        ),
        *("LICENSE.safetensors", "license.py", "README.json", "notice.bin", "unknown", "1_Pooling/config.json"),
        *(".model", ".x.safetensors", "additional_chat_templates/.jinja", ".config.json", "../README.md", ""),
        *("README.md/config.json", "license_tokens.model", "licenses/vocab.txt"),
    ],
)
def test_every_other_name_counts_as_read(name: str) -> None:
    assert not is_inert(name)
