"""Serve a model over HTTP: python scripts/serve.py --model runs/quickstart/best"""

from tinystories_slm.commands import run

if __name__ == "__main__":
    run("serve")
