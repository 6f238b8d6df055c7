"""What looks after a finished output: verify, rescore, repair, gc."""
