"""What the weights that the paper's authors published were trained with; their checkpoint does not say."""

PUBLISHED = ("--datasource=miniimagenet", "--num_classes=5", "--update_batch_size=1", "--num_query=15")
