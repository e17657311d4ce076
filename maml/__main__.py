"""`python -m maml …` is `python main.py …`, wherever it is installed."""

from maml.commands.train import run

if __name__ == "__main__":
    run()
