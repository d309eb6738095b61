#include "gram_call.cuh"

template std::int64_t liar::cuda::gram_update_of<liar::cuda::bf16>(const GramCall&, void*, Place);
