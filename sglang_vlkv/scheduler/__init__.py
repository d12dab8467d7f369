"""SGLang's scheduler process: a request's plan, its room, its compaction, its report."""
