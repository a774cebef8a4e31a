"""The layers inside other frameworks, on their own terms; each adapter imports its framework, and nothing else does."""
