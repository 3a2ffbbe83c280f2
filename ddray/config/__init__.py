"""What each verb can be told, checked before anything starts: a module a verb."""
