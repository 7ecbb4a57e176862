"""Try models on a web page: python scripts/demo.py --model runs/quickstart/best"""

from tinystories_slm.commands import run

if __name__ == "__main__":
    run("demo")
