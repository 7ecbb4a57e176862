"""Score a model on stories: python scripts/evaluate.py --model runs/quickstart/best --data builtin"""

from tinystories_slm.cli import doorway
from tinystories_slm.evaluation.report import EvaluateArgs, evaluate

if __name__ == "__main__":
    doorway(evaluate, EvaluateArgs)
