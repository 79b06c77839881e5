"""The project's own seed_oss."""

from exprl_served_models.seed_oss import EntryClass as EntryClass
