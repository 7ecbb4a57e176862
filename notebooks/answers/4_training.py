# %% [markdown]
# Answers to the exercises of 4_training.ipynb

# %%
uniform_loss = torch.tensor(float(model.config.vocab_size)).log().item()

# %%
import math


def learning_rate(step, *, peak, warmup, steps):
    if step < warmup:
        return peak * (step + 1) / warmup
    fraction = (step - warmup + 1) / (steps - warmup)
    return peak * (1 + math.cos(math.pi * fraction)) / 2
