#include "gram_call.cuh"

template std::int64_t liar::cuda::gram_update_of<float>(const GramCall&, void*, Place);
