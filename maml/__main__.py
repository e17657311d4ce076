"""`python -m maml …` is `maml …`, and the command itself starts here."""

from maml.commands.runner import main

if __name__ == "__main__":
    main()
