"""The contract of a policy, and the stages ``score -> budget -> select -> merge`` that all share."""
