# %% [markdown]
# Answers to the exercises of 6_neurons.ipynb

# %%
def correlation(a, b):
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()


# %%
value = neurons[:, neuron].mean()
