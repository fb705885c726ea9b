"""What the prediction depends on: the kept samples of an evaluation, replays, contributions and faithfulness."""
