"""Imported first by fork servers, whose children inherit the setting."""

from tests.economy import collect_seldom

collect_seldom()
