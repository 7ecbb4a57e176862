"""`python -m tinystories_slm COMMAND`."""

from tinystories_slm.commands import main

if __name__ == "__main__":
    main()
