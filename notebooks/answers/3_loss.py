# %% [markdown]
# Answers to the exercises of 3_loss.ipynb

# %%
import math


def mean_loss(probabilities):
    return sum(-math.log(probability) for probability in probabilities) / len(probabilities)


# %%
def bits_per_byte(total_nats, texts):
    return total_nats / math.log(2) / sum(len(text.encode()) for text in texts)
