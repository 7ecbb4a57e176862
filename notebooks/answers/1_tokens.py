# %% [markdown]
# Answers to the exercises of 1_tokens.ipynb

# %%
def measure_bytes_per_token(text):
    return len(text.encode()) / len(tokenizer(text, add_special_tokens=False).input_ids)


# %%
character = "🦊"
