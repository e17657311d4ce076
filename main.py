"""Trains and tests MAML: `python main.py --datasource=omniglot --num_classes=5 --update_batch_size=1`."""

from maml.commands.train import run

if __name__ == "__main__":
    run()
