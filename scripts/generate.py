"""Tell stories: python scripts/generate.py --model runs/quickstart/best --prompt "Once upon a time" """

from tinystories_slm.cli import doorway
from tinystories_slm.generation.command import GenerateArgs, generate

if __name__ == "__main__":
    doorway(generate, GenerateArgs)
