"""From the shards of the trainer's ranks to the weights of the servers: the one room that knows both sides."""
