# %%
# Colab: set REPOSITORY to the address of the repository from which you opened this notebook.
REPOSITORY = "https://github.com/USER/tinystories_slm"

import importlib.util
import subprocess
import sys

if importlib.util.find_spec("tinystories_slm") is None:
    assert "/USER/" not in REPOSITORY, "REPOSITORY must be the address of your copy of the repository"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f"git+{REPOSITORY}"], check=True)

# %%
# All notebooks share one model. The first one trains it (about a minute); the others load it.
import logging

import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinystories_slm.config import parse_config
from tinystories_slm.training import train

logging.basicConfig(format="%(message)s", stream=sys.stdout, force=True)
logging.getLogger("tinystories_slm").setLevel(logging.INFO)
run_dir = train(parse_config(["--config", "configs/course.yaml"]))
tokenizer = AutoTokenizer.from_pretrained(run_dir / "best")
model = AutoModelForCausalLM.from_pretrained(run_dir / "best")
