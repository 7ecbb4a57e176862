"""Loss of each token: python scripts/surprisal.py --model runs/quickstart/best --data builtin"""

from tinystories_slm.commands import run

if __name__ == "__main__":
    run("surprisal")
