#include "gram_call.cuh"

template std::int64_t liar::cuda::gram_update_of<liar::cuda::f16>(const GramCall&, void*, Place);
