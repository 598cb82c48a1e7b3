"""The zoo, installed as ``mobazoo.models``: one folder a family."""
