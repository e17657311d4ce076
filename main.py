"""`python main.py …` is `maml …`, from a checkout that is not installed, as the original was called."""

from maml.commands.runner import main

if __name__ == "__main__":
    main()
