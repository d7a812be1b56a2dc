"""What acts on the shards from outside: on all of them as one optimizer, and as one worker."""
