"""`exprl report`: one self-contained page about runs, from what they leave on disk."""
