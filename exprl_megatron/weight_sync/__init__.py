"""Weight sync: sends the trainer ranks' shards to the servers. The only package that knows both sides."""
