"""The model card of an exported prompt: the README.md of its folder, which the hub shows."""

from orchestrator.cli.workbench.card.card import model_card
from orchestrator.cli.workbench.card.facts import CardFacts, card_facts

__all__ = ["CardFacts", "card_facts", "model_card"]
