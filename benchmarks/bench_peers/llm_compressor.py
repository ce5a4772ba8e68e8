"""Convert SRC to OUT with llm-compressor's `model_free_ptq`: shard by shard, W8A8 int8, two worker threads."""

import sys

from llmcompressor import model_free_ptq

WORKERS = 2


def main(src: str, out: str) -> None:
    # Without a model it cannot know which 2-D weights are Linear; embeddings have to be named.
    model_free_ptq(src, out, scheme="W8A8", ignore=["lm_head", "re:.*embed.*"], max_workers=WORKERS, device="cpu")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
