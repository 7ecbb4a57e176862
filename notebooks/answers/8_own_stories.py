# %% [markdown]
# Answers to the exercises of 8_own_stories.ipynb

# %%
def write_own_story(number):
    draw = random.Random(number)
    animal, color, food = (
        draw.choice(["cat", "dog", "fox"]),
        draw.choice(["red", "blue", "green"]),
        number % 7 + 2,
    )
    return (
        f"A {color} {animal} baked {food} cakes. Nobody came to eat them, so the {animal} carried them "
        f"to the river. There, {food} frogs were hungry. They ate all the cakes and sang for the {color} "
        f"{animal} until it was dark."
    )


# %%
from math import exp

old, new = exp(before["stories of the course"]), exp(after["stories of the course"])
rise_in_percent = 100 * (new - old) / old
