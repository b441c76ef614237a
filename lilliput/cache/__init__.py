"""The answer cache: answers by similar questions, its threshold, and what it saves."""
