"""What tests of several directories share: small models, runs, judges, ranks and servers."""
