"""Modelfile of Ollama, beside the GGUF file."""

from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

from tinystories_slm.data.chat_template import has_block_template

MODELFILE = "Modelfile"
_PARAMETERS = ("temperature", "top_k", "top_p")


def write_modelfile(
    folder: Path, gguf_file: str, tokenizer: PreTrainedTokenizerBase, defaults: GenerationConfig, context: int
) -> None:
    """Write what `ollama create NAME -f Modelfile` reads: prompt, sampling parameters, end of a text.

    The template has no start token: the GGUF file requests it, and a written one would be the second. A model
    of blocks reads the lines of the prompt (`Words: ...`) up to `Story:`.
    """
    prompt = "{{ .Prompt }}\nStory:" if has_block_template(tokenizer) else "{{ .Prompt }}"
    parameters = {
        **{name: getattr(defaults, name) for name in _PARAMETERS},
        "num_ctx": context,
        "num_predict": context,  # the default has no limit
        "stop": f'"{tokenizer.eos_token}"',
    }
    lines = [f"FROM ./{gguf_file}", f'TEMPLATE """{prompt}"""']
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
